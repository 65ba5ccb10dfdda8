package api

import (
	"crypto/sha512"
	"encoding/hex"

	"ashlar/internal/catalog"
)

// constants are the nouns of the dialect that Ashlar does not have, or has in one piece only: what is listed here answers so that clients find what they
// index, and says 501 for the rest.
func (h *Handler) constants() []*noun {
	empty := func(schema string) handler {
		return func(c *call) (any, error) { return collect(c, schema, []Resource{}), nil }
	}
	absent := func(what string) handler {
		return func(c *call) (any, error) {
			return nil, Failure(CodeNotFound, "%s %s: there is none: %ss are not built yet", what, quote(c.id), what)
		}
	}
	none := func(schema, plural, what string) *noun {
		return &noun{schema: schema, plural: plural, list: empty(schema), get: absent(what), remove: absent(what)}
	}
	jobs := none("recurringJob", "recurringjobs", "recurring job")
	jobs.create, jobs.update = notBuilt("recurring jobs"), notBuilt("recurring jobs")
	volumeJobs := none("volumeRecurringJob", "volumerecurringjobs", "recurring job")
	volumeJobs.remove = nil
	backups := none("backupVolume", "backupvolumes", "backup")
	backups.update = absent("backup")
	backups.actions = map[string]verb{}
	for _, name := range []string{"backupList", "backupGet", "backupDelete", "backupListByVolume", "backupVolumeSync"} {
		backups.actions[name] = verb{do: absent("backup"), unbuilt: true}
	}
	system := none("systemBackup", "systembackups", "system backup")
	system.create = notBuilt("system backups")
	restores := none("systemRestore", "systemrestores", "system restore")
	restores.create = notBuilt("system restores")
	bundles := none("supportBundle", "supportbundles", "support bundle")
	bundles.create, bundles.remove = notBuilt("support bundles"), nil
	follows := []catalog.Kind{catalog.KindNode, catalog.KindAlive, catalog.KindVolume}
	return []*noun{
		{schema: "engineImage", plural: "engineimages", one: EngineImage{}, kinds: follows, list: h.engineImageList, get: h.engineImageGet, create: notBuilt("other engine images"), remove: h.engineImageDelete},
		{schema: "instanceManager", plural: "instancemanagers", one: InstanceManager{}, kinds: follows, list: h.instanceManagerList, get: h.instanceManagerGet},
		{schema: "backupTarget", plural: "backuptargets", one: BackupTarget{}, updateIn: backupTargetInput{}, list: h.backupTargetList, get: h.backupTargetGet, create: notBuilt("backup targets"),
			update: h.backupTargetUpdate, remove: notBuilt("backup targets"),
			actions: map[string]verb{"backupTargetUpdate": {do: h.backupTargetUpdate, in: backupTargetInput{}, out: BackupTarget{}}, "backupTargetSync": unbuilt("backup targets")}},
		jobs, volumeJobs, backups, none("backupBackingImage", "backupbackingimages", "image backup"), system, restores, bundles,
	}
}

// engineImage is the name of the one engine image.
func (h *Handler) engineImage() string { return "ashlar:" + h.cfg.Version }

func (h *Handler) engineImageName() string {
	sum := sha512.Sum512([]byte(h.engineImage()))
	return "ei-" + hex.EncodeToString(sum[:4])
}

func (h *Handler) theEngineImage(c *call) (EngineImage, error) {
	ctx := c.r.Context()
	e := EngineImage{
		Resource: c.resource(h.engineImageName()), Name: h.engineImageName(), Image: h.engineImage(), Default: true, State: "deployed", Version: h.cfg.Version,
		NodeDeploymentMap: map[string]bool{}, CLIAPIVersion: 10, CLIAPIMinVersion: 3, ControllerAPIVersion: 5, ControllerAPIMinVersion: 3,
		DataFormatVersion: 1, DataFormatMinVersion: 1,
	}
	nodes, err := h.loadNodes(ctx)
	if err != nil {
		return e, err
	}
	for _, name := range nodes.names() {
		e.NodeDeploymentMap[name] = nodes.up(name)
	}
	volumes, err := list[catalog.VolumeWanted, catalog.VolumeObserved](ctx, h, catalog.KindVolume)
	if err != nil {
		return e, err
	}
	// The dialect counts a volume, its engine and its replicas.
	for _, v := range volumes.wanted {
		e.RefCount += 2 + v.Copies
	}
	if e.RefCount == 0 {
		e.NoRefSince = stamp(h.cfg.Now())
	}
	return e, nil
}

func (h *Handler) engineImageList(c *call) (any, error) {
	e, err := h.theEngineImage(c)
	if err != nil {
		return nil, err
	}
	return collect(c, c.noun.schema, []EngineImage{e}), nil
}

func (h *Handler) engineImageGet(c *call) (any, error) {
	if c.id != h.engineImageName() {
		return nil, Failure(CodeNotFound, "engine image %s: there is only %s", quote(c.id), h.engineImageName())
	}
	return h.theEngineImage(c)
}

func (h *Handler) engineImageDelete(c *call) (any, error) {
	if c.id != h.engineImageName() {
		return nil, Failure(CodeNotFound, "engine image %s: there is only %s", quote(c.id), h.engineImageName())
	}
	return nil, Failure(CodeInUse, "unable to delete the default engine image %s while being used", c.id)
}

func instanceManagerName(node string) string { return "instance-manager-" + node }

// instanceManagers makes one for each node.
func (h *Handler) instanceManagers(c *call) ([]InstanceManager, error) {
	nodes, err := h.loadNodes(c.r.Context())
	if err != nil {
		return nil, err
	}
	volumes, err := list[catalog.VolumeWanted, catalog.VolumeObserved](c.r.Context(), h, catalog.KindVolume)
	if err != nil {
		return nil, err
	}
	var out []InstanceManager
	for _, name := range nodes.names() {
		m := InstanceManager{
			Resource: c.resource(instanceManagerName(name)), Name: instanceManagerName(name), NodeID: name, CurrentState: "running", Image: h.engineImage(),
			ManagerType: "aio", DataEngine: "v1", Instances: map[string]Instance{}, InstanceEngines: map[string]Instance{}, InstanceReplicas: map[string]Instance{},
		}
		if !nodes.up(name) {
			m.CurrentState = "unknown"
		}
		running := func(instance string) Instance {
			return Instance{Spec: map[string]string{"name": instance, "dataEngine": "v1"}, Status: map[string]string{"state": "running"}}
		}
		for _, volume := range volumes.names() {
			o := volumes.observed[volume]
			if nodes.down(name) {
				break // nobody can say what runs there
			}
			if o.Node == name && o.State == catalog.VolumeAttached {
				m.InstanceEngines[volume+"-e-0"] = running(volume + "-e-0")
			}
			for _, r := range o.Replicas {
				if r.Node == name && r.Running {
					m.InstanceReplicas[replicaName(volume, r.ReplicaID)] = running(replicaName(volume, r.ReplicaID))
				}
			}
		}
		out = append(out, m)
	}
	return out, nil
}

func (h *Handler) instanceManagerList(c *call) (any, error) {
	all, err := h.instanceManagers(c)
	if err != nil {
		return nil, err
	}
	return collect(c, c.noun.schema, all), nil
}

func (h *Handler) instanceManagerGet(c *call) (any, error) {
	all, err := h.instanceManagers(c)
	if err != nil {
		return nil, err
	}
	for _, m := range all {
		if m.Name == c.id {
			return m, nil
		}
	}
	return nil, Failure(CodeNotFound, "instance manager %s: there is no such instance manager", quote(c.id))
}

func (h *Handler) theBackupTarget(c *call) BackupTarget {
	return BackupTarget{
		Resource: c.resource("default", "backupTargetUpdate"), Name: "default", PollInterval: "5m0s", Message: "backups are not built yet",
	}
}

func (h *Handler) backupTargetList(c *call) (any, error) {
	return collect(c, c.noun.schema, []BackupTarget{h.theBackupTarget(c)}), nil
}

func (h *Handler) backupTargetGet(c *call) (any, error) {
	if c.id != "default" {
		return nil, Failure(CodeNotFound, "backup target %s: there is only default", quote(c.id))
	}
	return h.theBackupTarget(c), nil
}

type backupTargetInput struct {
	BackupTargetURL string `json:"backupTargetURL"`
}

// backupTargetUpdate takes an empty URL, which is how it is, and nothing else.
func (h *Handler) backupTargetUpdate(c *call) (any, error) {
	var in backupTargetInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	if in.BackupTargetURL != "" {
		return nil, missing("backup targets")
	}
	return h.backupTargetGet(c)
}

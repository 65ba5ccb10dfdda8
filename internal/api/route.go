package api

import (
	"encoding/json"
	"net/http"
	"net/url"
	"runtime/debug"
	"slices"
	"strings"
)

// noun is a type of the dialect: where it lives and what may be done with it. Its schema is made from which of these are set.
type noun struct {
	schema  string // id of its schema, the type of its resources
	plural  string // path below /v1
	list    handler
	create  handler
	get     handler
	update  handler
	remove  handler
	actions map[string]handler // POST /v1/PLURAL/ID?action=NAME
	sub     map[string]handler // GET /v1/PLURAL/ID/NAME
	hidden  bool               // ours, and no schema of the dialect
}

// routes lists what is served below /v1.
func (h *Handler) routes() map[string]*noun {
	all := []*noun{
		{schema: "schema", plural: "schemas", list: h.schemaList, get: h.schemaGet},
		{schema: "volume", plural: "volumes", list: h.volumeList, create: h.volumeCreate, get: h.volumeGet, remove: h.volumeDelete, actions: h.volumeActions()},
		{schema: "backingImage", plural: "backingimages", list: h.imageList, create: h.imageCreate, get: h.imageGet, remove: h.imageDelete,
			actions: h.imageActions(), sub: map[string]handler{"download": notBuilt("image download")}},
		{schema: "node", plural: "nodes", list: h.nodeList, get: h.nodeGet, update: h.nodeUpdate,
			actions: map[string]handler{"diskUpdate": h.diskUpdate, "shutdown": h.shutdown}},
		{schema: "setting", plural: "settings", list: h.settingList, get: h.settingGet, update: h.settingUpdate},
		{schema: "event", plural: "events", list: h.eventList, hidden: true},
		{schema: "about", plural: "about", list: h.about, hidden: true},
	}
	all = append(all, h.constants()...)
	nouns := map[string]*noun{}
	for _, n := range all {
		nouns[n.plural] = n
	}
	return nouns
}

// notBuilt answers 501 and says what is missing.
func notBuilt(what string) handler {
	return func(*call) (any, error) { return nil, missing(what) }
}

func missing(what string) error {
	return Failure(CodeNotBuilt, "%s: not built yet; docs/compat.md lists what is", what)
}

// ServeHTTP answers one request, always with JSON or nothing, except /metrics.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		if p := recover(); p != nil && p != http.ErrAbortHandler {
			h.cfg.Log.Error("request panicked", "method", r.Method, "path", r.URL.Path, "panic", p, "stack", string(debug.Stack()))
			h.fail(w, r, Failure(CodeInternal, "this request hit a mistake in the program; its log says where"))
		}
	}()
	// A page in a browser on this machine could reach loopback; requests that a browser marks as another site's are refused.
	if err := h.origin.Check(r); err != nil {
		h.fail(w, r, Because(err, CodeForbidden, "a request from another web site is refused"))
		return
	}
	switch r.URL.Path {
	case "/healthz":
		h.plain(w, r, h.healthz)
		return
	case "/readyz":
		h.plain(w, r, h.readyz)
		return
	case "/metrics":
		h.metrics(w, r)
		return
	}
	answer, err := h.dispatch(w, r)
	if err != nil {
		h.fail(w, r, err)
		return
	}
	h.send(w, http.StatusOK, answer)
}

// plain serves what is outside /v1 and only read.
func (h *Handler) plain(w http.ResponseWriter, r *http.Request, f func(*http.Request) (int, any)) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		h.fail(w, r, wrongMethod(w, r, []string{http.MethodGet}))
		return
	}
	status, answer := f(r)
	h.send(w, status, answer)
}

// dispatch finds the handler of /v1/PLURAL[/ID[/SUB]] and calls it.
func (h *Handler) dispatch(w http.ResponseWriter, r *http.Request) (any, error) {
	nothing := Failure(CodeNotFound, "there is nothing at %s; begin at /v1/schemas", quote(r.URL.Path))
	// Split before unescaping, so that an escaped slash stays part of the name it was meant for.
	parts := strings.Split(strings.TrimSuffix(r.URL.EscapedPath(), "/"), "/")
	for i := range parts {
		p, err := url.PathUnescape(parts[i])
		if err != nil {
			return nil, nothing
		}
		parts[i] = p
	}
	if len(parts) < 2 || parts[0] != "" || parts[1] != "v1" || len(parts) > 5 {
		return nil, nothing
	}
	c := &call{r: r, w: w, base: baseURL(r)}
	if len(parts) == 2 {
		return h.version(c)
	}
	c.noun = h.nouns[parts[2]]
	if c.noun == nil {
		return nil, nothing
	}
	var methods map[string]handler
	switch len(parts) {
	case 3:
		methods = map[string]handler{http.MethodGet: c.noun.list, http.MethodPost: c.noun.create}
	case 4:
		c.id = parts[3]
		methods = map[string]handler{http.MethodGet: c.noun.get, http.MethodPut: c.noun.update, http.MethodDelete: c.noun.remove}
		if len(c.noun.actions) > 0 {
			methods[http.MethodPost] = h.action
		}
	case 5:
		c.id = parts[3]
		if c.noun.sub[parts[4]] == nil {
			return nil, nothing
		}
		methods = map[string]handler{http.MethodGet: c.noun.sub[parts[4]]}
	}
	if f := methods[r.Method]; f != nil {
		return f(c)
	}
	var allowed []string
	for m, f := range methods {
		if f != nil {
			allowed = append(allowed, m)
		}
	}
	if len(allowed) == 0 {
		return nil, nothing
	}
	return nil, wrongMethod(w, r, allowed)
}

func wrongMethod(w http.ResponseWriter, r *http.Request, allowed []string) error {
	slices.Sort(allowed)
	list := strings.Join(allowed, ", ")
	w.Header().Set("Allow", list)
	return Failure(CodeMethod, "%s is not a method of %s; it has %s", quote(r.Method), quote(r.URL.Path), list)
}

// action serves POST /v1/PLURAL/ID?action=NAME.
func (h *Handler) action(c *call) (any, error) {
	name := c.r.URL.Query().Get("action")
	f := c.noun.actions[name]
	if f == nil {
		return nil, Failure(CodeNotFound, "%s %s: there is no action %s", c.noun.schema, quote(c.id), quote(name))
	}
	return f(c)
}

// version answers /v1 itself with links to the collections.
func (h *Handler) version(c *call) (any, error) {
	if c.r.Method != http.MethodGet {
		return nil, wrongMethod(c.w, c.r, []string{http.MethodGet})
	}
	res := Resource{ID: "v1", Type: "apiVersion", Links: map[string]string{"self": c.url()}, Actions: map[string]string{}}
	for plural := range h.nouns {
		res.Links[plural] = c.url(plural)
	}
	return res, nil
}

// send writes an answer; nil is an empty body.
func (h *Handler) send(w http.ResponseWriter, status int, answer any) {
	if answer == nil {
		w.WriteHeader(status)
		return
	}
	data, err := json.Marshal(answer)
	if err != nil {
		// Nothing that handlers return can fail to be encoded.
		panic(err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	// A client that went away is nobody's error.
	_, _ = w.Write(append(data, '\n'))
}

// fail writes an error in the dialect's form.
func (h *Handler) fail(w http.ResponseWriter, r *http.Request, err error) {
	e := h.asError(err)
	if e.Code == CodeInternal {
		h.cfg.Log.Error("request failed", "method", r.Method, "path", r.URL.Path, "error", err)
	}
	h.send(w, e.Status, ErrorBody{
		Type: "error", Links: map[string]string{"self": baseURL(r) + r.URL.EscapedPath()}, Actions: map[string]string{},
		Status: e.Status, Code: http.StatusText(e.Status), Reason: e.Code, Message: e.Message,
	})
}

package api

import (
	"io"
	"net/http"
	"net/url"
	"runtime/debug"
	"slices"
	"strconv"
	"strings"

	"ashlar/internal/catalog"
)

// noun is a type of the dialect: where it lives and what may be done with it. Its schema, its part of the OpenAPI document and its websocket are made from which of
// these are set.
type noun struct {
	schema   string // id of its schema, the type of its resources
	plural   string // path below /v1
	one      any    // a zero resource
	list     handler
	query    []param // of list
	create   handler
	createIn any // zero value of what create reads
	get      handler
	update   handler
	updateIn any
	remove   handler

	removeQuery []param         // of remove
	actions     map[string]verb // POST /v1/PLURAL/ID?action=NAME
	ways        []way
	kinds       []catalog.Kind // the records its resources are made of; none: it never changes
	single      bool           // list answers one resource, not a collection
	hidden      bool           // ours, and no schema of the dialect
}

// verb is an action.
type verb struct {
	do      handler
	in, out any  // zero values of what is read and answered; nil: nothing
	reads   bool // changes nothing, though it is a POST: the dialect asks for snapshots that way
	unbuilt bool // answers 501
}

// way is something to GET below a noun that is no resource of it.
type way struct {
	path   string // below /v1/PLURAL: segments, those in braces bound to call.vars; "name" also to call.id
	about  string
	do     handler
	head   bool // HEAD is answered too, by do
	query  []param
	media  []string // content types of the answer; none: JSON of out
	out    any
	status int // of the answer; 0: 200
}

// param is a parameter in a URL's query.
type param struct {
	name, about string
	options     []string // if only these are allowed
}

// routes lists what is served below /v1.
func (h *Handler) routes() map[string]*noun {
	all := []*noun{
		{schema: "schema", plural: "schemas", one: Schema{}, list: h.schemaList, get: h.schemaGet},
		{schema: "volume", plural: "volumes", one: Volume{}, list: h.volumeList, create: h.volumeCreate, createIn: volumeInput{}, get: h.volumeGet, remove: h.volumeDelete,
			actions: h.volumeActions(), kinds: []catalog.Kind{catalog.KindVolume, catalog.KindNode, catalog.KindAlive, catalog.KindOperation}, ways: []way{h.volumeDownloadWay()}},
		{schema: "backingImage", plural: "backingimages", one: BackingImage{}, list: h.imageList, create: h.imageCreate, createIn: imageInput{}, get: h.imageGet,
			remove: h.imageDelete, actions: h.imageActions(), kinds: []catalog.Kind{catalog.KindImage, catalog.KindNode, catalog.KindAlive}, ways: []way{h.imageDownloadWay()}},
		{schema: "node", plural: "nodes", one: Node{}, list: h.nodeList, get: h.nodeGet, update: h.nodeUpdate, updateIn: nodeInput{},
			remove: h.nodeDelete, removeQuery: []param{{name: "force", about: "true: a dead node that has something; that is given up", options: []string{"true", "false"}}},
			ways: h.nodeWays(), actions: h.nodeActions(), kinds: []catalog.Kind{catalog.KindNode, catalog.KindAlive, catalog.KindLeader, catalog.KindVolume, catalog.KindImage}},
		{schema: "setting", plural: "settings", one: Setting{}, list: h.settingList, get: h.settingGet, update: h.settingUpdate, updateIn: settingInput{},
			kinds: []catalog.Kind{catalog.KindSetting}},
		{schema: "event", plural: "events", one: Event{}, list: h.eventList, get: h.eventGet, query: eventQuery(), kinds: []catalog.Kind{catalog.KindEvent}, hidden: true},
		{schema: "operation", plural: "operations", one: Operation{}, list: h.operationList, kinds: []catalog.Kind{catalog.KindOperation}, hidden: true, ways: h.operationWays()},
		{schema: "token", plural: "tokens", one: Token{}, list: h.tokenList, create: h.tokenCreate, createIn: tokenInput{}, get: h.tokenGet, remove: h.tokenDelete,
			kinds: []catalog.Kind{catalog.KindToken}, hidden: true},
		{schema: "about", plural: "about", one: About{}, list: h.about, single: true, hidden: true},
		{schema: "overview", plural: "overview", one: Overview{}, list: h.overview, single: true, hidden: true,
			kinds: []catalog.Kind{catalog.KindNode, catalog.KindAlive, catalog.KindLeader, catalog.KindVolume, catalog.KindImage, catalog.KindEvent}},
		{schema: "websocket", plural: "ws", hidden: true, ways: h.socketWays()},
		{schema: "catalogue", plural: "catalogue", hidden: true, ways: h.backupWays()},
		{schema: "openapi", plural: "openapi.json", one: object{}, list: h.openAPI, single: true, hidden: true},
	}
	all = append(append(all, h.clusterNouns()...), h.constants()...)
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

// unbuilt is an action that answers 501.
func unbuilt(what string) verb { return verb{do: notBuilt(what), unbuilt: true} }

func missing(what string) error {
	return Failure(CodeNotBuilt, "%s: not built yet; docs/compat.md lists what is", what)
}

// sent is the answer of a handler that has written it itself.
type sent struct{}

// ServeHTTP answers one request: with JSON or nothing, except /metrics, downloads and streams. A download that breaks off panics with http.ErrAbortHandler, on which
// net/http breaks the connection.
func (h *Handler) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	defer func() {
		switch p := recover(); p {
		case nil:
		case http.ErrAbortHandler:
			panic(p)
		default:
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
	}
	may, err := h.admit(r)
	if err != nil {
		h.fail(w, r, err)
		return
	}
	if r.URL.Path == "/metrics" {
		h.metrics(w, r)
		return
	}
	answer, err := h.dispatch(w, r, may)
	if err != nil {
		h.fail(w, r, err)
		return
	}
	if _, ok := answer.(sent); !ok {
		write(w, http.StatusOK, answer)
	}
}

// plain serves what is outside /v1 and only read.
func (h *Handler) plain(w http.ResponseWriter, r *http.Request, f func(*http.Request) (int, any)) {
	if r.Method != http.MethodGet && r.Method != http.MethodHead {
		h.fail(w, r, wrongMethod(w, r, []string{http.MethodGet}))
		return
	}
	status, answer := f(r)
	write(w, status, answer)
}

// nothingAt is what is said of a path that is not served.
func nothingAt(r *http.Request) error {
	return Failure(CodeNotFound, "there is nothing at %s; begin at /v1/schemas", quote(r.URL.Path))
}

// segments splits a path below /v1 before unescaping, so that an escaped slash stays part of the name it was meant for; nil if it is not below /v1.
func segments(r *http.Request) []string {
	parts := strings.Split(strings.TrimSuffix(r.URL.EscapedPath(), "/"), "/")
	for i := range parts {
		p, err := url.PathUnescape(parts[i])
		if err != nil {
			return nil
		}
		parts[i] = p
	}
	if len(parts) < 2 || parts[0] != "" || parts[1] != "v1" || len(parts) > 5 {
		return nil
	}
	return parts[2:]
}

// dispatch finds the handler of /v1/PLURAL[/ID], an action or a way, and calls it.
func (h *Handler) dispatch(w http.ResponseWriter, r *http.Request, may access) (any, error) {
	parts := segments(r)
	if parts == nil {
		return nil, nothingAt(r)
	}
	c := &call{r: r, w: w, base: baseURL(r), access: may}
	if len(parts) == 0 {
		return h.version(c)
	}
	c.noun = h.nouns[parts[0]]
	if c.noun == nil {
		return nil, nothingAt(r)
	}
	methods := c.methods(parts[1:])
	if f := methods[r.Method]; f != nil {
		if r.Method == http.MethodPut || r.Method == http.MethodDelete || r.Method == http.MethodPost && c.id == "" {
			if err := c.mayWrite(); err != nil {
				return nil, err
			}
		}
		return f(c)
	}
	var allowed []string
	for m, f := range methods {
		if f != nil {
			allowed = append(allowed, m)
		}
	}
	if len(allowed) == 0 {
		return nil, nothingAt(r)
	}
	return nil, wrongMethod(w, r, allowed)
}

// methods are the handlers of a path below a noun; it binds the call's id and vars.
func (c *call) methods(rest []string) map[string]handler {
	if len(rest) == 0 {
		return map[string]handler{http.MethodGet: c.noun.list, http.MethodPost: c.noun.create}
	}
	for _, w := range c.noun.ways {
		if vars := w.match(rest); vars != nil {
			c.vars, c.id = vars, vars["name"]
			m := map[string]handler{http.MethodGet: w.do}
			if w.head {
				m[http.MethodHead] = w.do
			}
			return m
		}
	}
	if len(rest) > 1 {
		return nil
	}
	c.id = rest[0]
	m := map[string]handler{http.MethodGet: c.noun.get, http.MethodPut: c.noun.update, http.MethodDelete: c.noun.remove}
	if len(c.noun.actions) > 0 {
		m[http.MethodPost] = action
	}
	return m
}

// match binds a path's segments to the way's; nil if it is another path.
func (w way) match(rest []string) map[string]string {
	pattern := strings.Split(w.path, "/")[1:]
	if len(pattern) != len(rest) {
		return nil
	}
	vars := map[string]string{}
	for i, p := range pattern {
		if name, ok := strings.CutPrefix(p, "{"); ok {
			vars[strings.TrimSuffix(name, "}")] = rest[i]
		} else if p != rest[i] {
			return nil
		}
	}
	return vars
}

func wrongMethod(w http.ResponseWriter, r *http.Request, allowed []string) error {
	slices.Sort(allowed)
	list := strings.Join(allowed, ", ")
	w.Header().Set("Allow", list)
	return Failure(CodeMethod, "%s is not a method of %s; it has %s", quote(r.Method), quote(r.URL.Path), list)
}

// action serves POST /v1/PLURAL/ID?action=NAME.
func action(c *call) (any, error) {
	name := c.r.URL.Query().Get("action")
	v := c.noun.actions[name]
	if v.do == nil {
		return nil, Failure(CodeNotFound, "%s %s: there is no action %s", c.noun.schema, quote(c.id), quote(name))
	}
	if !v.reads {
		if err := c.mayWrite(); err != nil {
			return nil, err
		}
	}
	return v.do(c)
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

// write writes an answer; nil is an empty body.
func write(w http.ResponseWriter, status int, answer any) {
	if answer == nil {
		w.WriteHeader(status)
		return
	}
	data, err := encode(answer)
	if err != nil {
		// Nothing that handlers return can fail to be encoded.
		panic(err)
	}
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.Header().Set("Content-Length", strconv.Itoa(len(data)+1))
	w.WriteHeader(status)
	// A client that went away is nobody's error.
	_, _ = w.Write(data)
	_, _ = io.WriteString(w, "\n")
}

// fail writes an error in the dialect's form.
func (h *Handler) fail(w http.ResponseWriter, r *http.Request, err error) {
	e := h.asError(err)
	if e.Code == CodeInternal {
		h.cfg.Log.Error("request failed", "method", r.Method, "path", r.URL.Path, "error", err)
	}
	if isUnauthorized(e) {
		challenge(w.Header(), r)
	}
	write(w, e.Status, errorBody(r, e))
}

func errorBody(r *http.Request, e *Error) ErrorBody {
	return ErrorBody{
		Type: "error", Links: map[string]string{"self": baseURL(r) + r.URL.EscapedPath()}, Actions: map[string]string{},
		Status: e.Status, Code: http.StatusText(e.Status), Reason: e.Code, Message: e.Message,
	}
}

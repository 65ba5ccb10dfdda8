package api

import (
	"embed"
	"encoding/json"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"net/http"
	"path"
	"reflect"
	"slices"
	"strings"
)

// This file makes the OpenAPI 3.1 document from what is served: routes() says which paths and verbs there are, reflection on the structs that travel what they look
// like, and the comments in these sources, which the program carries with it, what their fields mean.

//go:embed attach.go cluster.go constant.go export.go image.go limit.go node.go node_contents.go operation.go overview.go resource.go setting.go snapshot.go token.go volume.go
var sources embed.FS

// object is a JSON object under construction.
type object = map[string]any

// rawBody stands for a body that is no JSON: the bytes of an image.
type rawBody struct{}

// schemaPlace is where schemas live in the document.
const schemaPlace = "#/components/schemas/"

// openAPI answers GET /v1/openapi.json. The document is the same for all; it is made when somebody first asks.
func (h *Handler) openAPI(c *call) (any, error) { return json.RawMessage(h.document()), nil }

// describe makes the document.
func (h *Handler) describe() []byte {
	b := &describer{schemas: object{}, docs: fieldDocs()}
	b.ref(reflect.TypeFor[ErrorBody]())
	paths := object{
		"/v1":      object{"get": b.operation("version", "Links to the collections.", Resource{})},
		"/healthz": object{"get": b.operation("healthz", "This process answers. Needs no token.", Health{})},
		"/readyz":  object{"get": b.operation("readyz", "Requests can be served. Needs no token.", Health{})},
		"/metrics": object{"get": b.raw(b.operation("metrics", "Prometheus.", nil), "text/plain", "200")},
	}
	readyz := paths["/readyz"].(object)["get"].(object)["responses"].(object)
	readyz["503"] = readyz["200"]
	for _, plural := range slices.Sorted(maps.Keys(h.nouns)) {
		b.noun(paths, h.nouns[plural])
	}
	data, err := json.Marshal(object{
		"openapi": "3.1.0",
		"info": object{"title": "Ashlar", "version": h.cfg.Version,
			"description": "Longhorn's /v1 dialect and what Ashlar adds in the same style. Actions of a resource are POSTs with ?action=NAME; x-ashlar-actions says what each takes and answers."},
		"servers":  []any{object{"url": "/"}},
		"security": []any{object{}, object{"bearer": []any{}}, object{"basic": []any{}}},
		"paths":    paths,
		"components": object{"schemas": b.schemas, "securitySchemes": object{
			"bearer": object{"type": "http", "scheme": "bearer", "description": "A token; needed over TLS."},
			"basic":  object{"type": "http", "scheme": "basic", "description": "A token as the password; any user."},
		}},
	})
	if err != nil {
		panic(err) // it is made of maps and text
	}
	return data
}

// describer collects schemas on the way.
type describer struct {
	schemas object
	docs    map[string]map[string]string
}

// noun describes all that is served for one.
func (b *describer) noun(paths object, n *noun) {
	collection, resource := object{}, object{}
	list := b.listOf(n)
	add := func(to object, method, what, about string, in, out any, served bool) {
		if !served {
			return
		}
		op := b.operation(what+"_"+n.schema, about, out)
		if in != nil {
			op["requestBody"] = object{"content": object{"application/json": object{"schema": b.ref(reflect.TypeOf(in))}}}
		}
		to[strings.ToLower(method)] = op
	}
	add(collection, http.MethodGet, "list", "All of them.", nil, list, n.list != nil)
	if len(n.query) > 0 {
		collection["get"].(object)["parameters"] = parameters(n.query)
	}
	if n.schema == "event" {
		b.raw(collection["get"].(object), mediaSSE, "200")
		b.raw(collection["get"].(object), mediaNDJSON, "200")
	}
	add(collection, http.MethodPost, "create", "Make one.", n.createIn, n.one, n.create != nil)
	add(resource, http.MethodGet, "get", "One of them.", nil, n.one, n.get != nil)
	add(resource, http.MethodPut, "update", "Change it.", n.updateIn, n.one, n.update != nil)
	add(resource, http.MethodDelete, "delete", "Ask for its end.", nil, nil, n.remove != nil)
	if len(n.removeQuery) > 0 {
		resource["delete"].(object)["parameters"] = parameters(n.removeQuery)
	}
	if len(n.actions) > 0 {
		resource["post"] = b.actions(n)
	}
	base := "/v1/" + n.plural
	if len(collection) > 0 {
		paths[base] = collection
	}
	if len(resource) > 0 {
		resource["parameters"] = pathParameters("/{name}")
		paths[base+"/{name}"] = resource
	}
	for _, w := range n.ways {
		paths[base+w.path] = b.way(n, w)
	}
}

// listOf is the zero value of what list answers.
func (b *describer) listOf(n *noun) any {
	switch {
	case n.single:
		return n.one
	case n.one == nil:
		return Collection[Resource]{}
	}
	// The generic type that collect makes cannot be named by reflection: the schema is made by hand.
	return collectionOf{reflect.TypeOf(n.one)}
}

// collectionOf stands for Collection of a type.
type collectionOf struct{ of reflect.Type }

func (b *describer) way(n *noun, w way) object {
	id := strings.NewReplacer("/", "_", "{", "", "}", "").Replace(n.schema + w.path)
	op := b.operation(id, w.about, w.out)
	for _, media := range w.media {
		b.raw(op, media, "200")
	}
	if w.status != 0 {
		op["responses"] = object{"101": object{"description": "the websocket is open"}, "default": errorAnswer()}
	}
	if len(w.query) > 0 {
		op["parameters"] = parameters(w.query)
	}
	out := object{"get": op, "parameters": pathParameters(w.path)}
	if w.head {
		head := maps.Clone(op)
		head["operationId"] = id + "_head"
		head["responses"] = object{"200": object{"description": "the headers of a GET"}, "default": object{"description": "the status of a GET"}}
		out["head"] = head
	}
	return out
}

// actions describes a resource's POST.
func (b *describer) actions(n *noun) object {
	var names, ins, outs []any
	each, bodies, seen := object{}, object{}, map[string]bool{}
	once := func(list *[]any, kind string, v any) any {
		if v == nil {
			return nil
		}
		ref := b.refOf(v)
		key, _ := json.Marshal(ref) // maps of text can always be encoded
		if !seen[kind+string(key)] {
			seen[kind+string(key)] = true
			*list = append(*list, ref)
		}
		return ref
	}
	for _, name := range slices.Sorted(maps.Keys(n.actions)) {
		v := n.actions[name]
		names = append(names, name)
		if _, raw := v.in.(rawBody); raw {
			bodies[mediaBytes] = object{"schema": object{"type": "string", "format": "binary"}}
			bodies["multipart/form-data"] = object{"schema": object{"type": "object", "properties": object{chunkName: object{"type": "string", "format": "binary"}}, "required": []any{chunkName}}}
			each[name] = object{"response": once(&outs, "out", v.out), "reads": v.reads, "unbuilt": v.unbuilt}
			continue
		}
		each[name] = object{"request": once(&ins, "in", v.in), "response": once(&outs, "out", v.out), "reads": v.reads, "unbuilt": v.unbuilt}
	}
	if len(ins) > 0 {
		bodies["application/json"] = object{"schema": object{"anyOf": ins}}
	}
	op := b.operation("act_"+n.schema, "One of its actions: x-ashlar-actions says what each takes and answers, which of them only read, and which are not built.", nil)
	if len(outs) > 0 {
		op["responses"].(object)["200"] = object{"description": "what the action answers, or nothing", "content": object{"application/json": object{"schema": object{"anyOf": outs}}}}
	}
	op["requestBody"] = object{"content": bodies}
	op["parameters"] = []any{
		object{"name": "action", "in": "query", "required": true, "schema": object{"type": "string", "enum": names}},
	}
	if bodies[mediaBytes] != nil {
		op["parameters"] = append(op["parameters"].([]any), object{"name": "size", "in": "query", "description": "of upload: how many bytes come; needed with a form", "schema": object{"type": "integer"}})
	}
	op["x-ashlar-actions"] = each
	return op
}

// operation describes one method of a path that answers JSON of out, or nothing.
func (b *describer) operation(id, about string, out any) object {
	ok := object{"description": "done"}
	if out != nil {
		ok["content"] = object{"application/json": object{"schema": b.refOf(out)}}
	}
	return object{"operationId": id, "description": about, "responses": object{"200": ok, "default": errorAnswer()}}
}

// raw adds a content type that is no JSON to an operation's answer.
func (b *describer) raw(op object, media, status string) object {
	answer := op["responses"].(object)[status].(object)
	content, _ := answer["content"].(object)
	if content == nil {
		content = object{}
		answer["content"] = content
	}
	content[media] = object{"schema": object{"type": "string"}}
	return op
}

func errorAnswer() object {
	return object{"description": "not done", "content": object{"application/json": object{"schema": object{"$ref": schemaPlace + "ErrorBody"}}}}
}

func parameters(query []param) []any {
	var out []any
	for _, p := range query {
		schema := object{"type": "string"}
		if len(p.options) > 0 {
			schema["enum"] = p.options
		}
		out = append(out, object{"name": p.name, "in": "query", "description": p.about, "schema": schema})
	}
	return out
}

func pathParameters(template string) []any {
	out := []any{}
	for part := range strings.SplitSeq(template, "/") {
		if name, ok := strings.CutPrefix(part, "{"); ok {
			out = append(out, object{"name": strings.TrimSuffix(name, "}"), "in": "path", "required": true, "schema": object{"type": "string"}})
		}
	}
	return out
}

// refOf is ref for a zero value.
func (b *describer) refOf(v any) any {
	if c, ok := v.(collectionOf); ok {
		return b.collection(c.of)
	}
	return b.ref(reflect.TypeOf(v))
}

// collection makes the schema of a collection of a type.
func (b *describer) collection(of reflect.Type) any {
	name := title(of.Name()) + "Collection"
	if b.schemas[name] == nil {
		b.ref(reflect.TypeFor[Collection[Resource]]())
		c := maps.Clone(b.schemas["ResourceCollection"].(object))
		props := maps.Clone(c["properties"].(object))
		props["data"] = object{"type": "array", "items": b.ref(of)}
		c["properties"] = props
		b.schemas[name] = c
	}
	return object{"$ref": schemaPlace + name}
}

// ref makes the schema of a type; that of a named struct is kept apart and referred to.
func (b *describer) ref(t reflect.Type) any {
	switch {
	case t == reflect.TypeFor[number]():
		return object{"type": []any{"string", "integer"}}
	case t == reflect.TypeFor[json.RawMessage]():
		return object{}
	}
	switch t.Kind() {
	case reflect.Pointer:
		return b.ref(t.Elem())
	case reflect.String:
		return object{"type": "string"}
	case reflect.Bool:
		return object{"type": "boolean"}
	case reflect.Int:
		return object{"type": "integer"}
	case reflect.Int64:
		return object{"type": "integer", "format": "int64"}
	case reflect.Slice:
		return object{"type": "array", "items": b.ref(t.Elem())}
	case reflect.Map:
		return object{"type": "object", "additionalProperties": b.ref(t.Elem())}
	case reflect.Struct:
		if t.Name() == "" {
			return b.structure(t)
		}
		name := schemaName(t)
		if b.schemas[name] == nil {
			b.schemas[name] = object{} // it may refer to itself
			b.schemas[name] = b.structure(t)
		}
		return object{"$ref": schemaPlace + name}
	}
	return object{}
}

// schemaName is a type's name as the document has it: Collection[…api.Volume] is VolumeCollection.
func schemaName(t reflect.Type) string {
	name, arg, generic := strings.Cut(t.Name(), "[")
	if generic {
		arg = strings.TrimSuffix(arg, "]")
		return title(arg[strings.LastIndexByte(arg, '.')+1:]) + name
	}
	return title(name)
}

// base is a type's name as its source has it.
func base(t reflect.Type) string {
	name, _, _ := strings.Cut(t.Name(), "[")
	return name
}

func title(s string) string { return strings.ToUpper(s[:1]) + s[1:] }

// structure makes the schema of a struct. What is answered is answered always, unless it is left out when it is empty; what is asked is optional.
func (b *describer) structure(t reflect.Type) object {
	props, required := object{}, []any{}
	input := strings.HasSuffix(t.Name(), "Input")
	for _, f := range reflect.VisibleFields(t) {
		tag, options, _ := strings.Cut(f.Tag.Get("json"), ",")
		if tag == "" || f.Anonymous {
			continue
		}
		schema, _ := b.ref(f.Type).(object)
		owner := t
		if len(f.Index) > 1 {
			owner = t.FieldByIndex(f.Index[:len(f.Index)-1]).Type
		}
		if doc := b.docs[base(owner)][f.Name]; doc != "" {
			schema = maps.Clone(schema)
			schema["description"] = doc
		}
		props[tag] = schema
		if !input && !strings.Contains(options, "omitempty") {
			required = append(required, tag)
		}
	}
	out := object{"type": "object", "properties": props}
	if len(required) > 0 {
		out["required"] = required
	}
	if doc := b.docs[base(t)][""]; doc != "" {
		out["description"] = doc
	}
	return out
}

// fieldDocs reads the comments of this package's structs: type, field (the empty one is the type itself), text.
func fieldDocs() map[string]map[string]string {
	out := map[string]map[string]string{}
	entries, err := sources.ReadDir(".")
	if err != nil {
		panic(err) // it was put together by the compiler
	}
	for _, e := range entries {
		data, err := sources.ReadFile(path.Base(e.Name()))
		if err != nil {
			panic(err)
		}
		file, err := parser.ParseFile(token.NewFileSet(), e.Name(), data, parser.ParseComments|parser.SkipObjectResolution)
		if err != nil {
			panic(err) // it was compiled
		}
		for _, decl := range file.Decls {
			if gen, ok := decl.(*ast.GenDecl); ok && gen.Tok == token.TYPE {
				typeDocs(gen, out)
			}
		}
	}
	return out
}

func typeDocs(gen *ast.GenDecl, out map[string]map[string]string) {
	for _, spec := range gen.Specs {
		ts := spec.(*ast.TypeSpec)
		st, ok := ts.Type.(*ast.StructType)
		if !ok {
			continue
		}
		docs := map[string]string{"": strings.Join(strings.Fields(gen.Doc.Text()), " ")}
		for _, f := range st.Fields.List {
			text := strings.Join(strings.Fields(f.Doc.Text()+" "+f.Comment.Text()), " ")
			for _, name := range f.Names {
				docs[name.Name] = text
			}
		}
		out[ts.Name.Name] = docs
	}
}

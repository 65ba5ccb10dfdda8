package api

import (
	"encoding/json"
	"fmt"
	"maps"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/google/jsonschema-go/jsonschema"

	"ashlar/internal/catalog"
)

// document is the OpenAPI document as a client reads it, with a validator for each schema that was asked for.
type document struct {
	paths map[string]map[string]json.RawMessage
	defs  string // all schemas, as $defs
	ready map[string]*jsonschema.Resolved
}

type describedOperation struct {
	OperationID string `json:"operationId"`
	Description string `json:"description"`
	Responses   map[string]struct {
		Content map[string]struct {
			Schema json.RawMessage `json:"schema"`
		} `json:"content"`
	} `json:"responses"`
	Actions map[string]struct {
		Response json.RawMessage `json:"response"`
		Request  json.RawMessage `json:"request"`
		Reads    bool            `json:"reads"`
		Unbuilt  bool            `json:"unbuilt"`
	} `json:"x-ashlar-actions"`
	Parameters []struct {
		Name   string `json:"name"`
		Schema struct {
			Enum []string `json:"enum"`
		} `json:"schema"`
	} `json:"parameters"`
}

// theDocument is read once: making its validators takes a while, and all Handlers have the same.
var theDocument = sync.OnceValues(func() (*document, error) {
	return readDocument(New(Config{Catalog: catalog.NewMem()}).document())
})

func readDocument(text []byte) (*document, error) {
	var doc struct {
		OpenAPI    string                                `json:"openapi"`
		Paths      map[string]map[string]json.RawMessage `json:"paths"`
		Components struct {
			Schemas map[string]map[string]any `json:"schemas"`
		} `json:"components"`
	}
	if err := json.Unmarshal(text, &doc); err != nil || doc.OpenAPI != "3.1.0" {
		return nil, fmt.Errorf("version %q: %w", doc.OpenAPI, err)
	}
	// The document does not close its objects, so that clients take what later builds add. Here nothing may be answered that it does not say.
	for _, s := range doc.Components.Schemas {
		if s["type"] == "object" && s["properties"] != nil {
			s["additionalProperties"] = false
		}
	}
	defs, err := json.Marshal(doc.Components.Schemas)
	return &document{paths: doc.Paths, defs: string(defs), ready: map[string]*jsonschema.Resolved{}}, err
}

// validate tells what is wrong with an answer.
func (d *document) validate(schema string, answer []byte) error {
	v := d.ready[schema]
	if v == nil {
		text := strings.ReplaceAll(`{"$defs":`+d.defs+`,"allOf":[`+schema+`]}`, schemaPlace, "#/$defs/")
		var s jsonschema.Schema
		if err := json.Unmarshal([]byte(text), &s); err != nil {
			return err
		}
		var err error
		if v, err = s.Resolve(nil); err != nil {
			return err
		}
		d.ready[schema] = v
	}
	var instance any
	if err := json.Unmarshal(answer, &instance); err != nil {
		return err
	}
	return v.Validate(instance)
}

// find finds the operation of a request; more literal paths win.
func (d *document) find(method, path string) (op describedOperation, ok bool) {
	parts := strings.Split(path, "/")
	best := -1
	for template, methods := range d.paths {
		want, literal := strings.Split(template, "/"), 0
		match := len(want) == len(parts)
		for i := 0; match && i < len(want); i++ {
			if strings.HasPrefix(want[i], "{") {
				continue
			}
			literal++
			match = want[i] == parts[i]
		}
		raw := methods[strings.ToLower(method)]
		if !match || raw == nil || literal < best {
			continue
		}
		best, op = literal, describedOperation{}
		if err := json.Unmarshal(raw, &op); err != nil {
			panic(err)
		}
		ok = true
	}
	return op, ok
}

// check compares an answer with what the document says of it. What is refused may be anything that is an error.
func (d *document) check(method, target string, status int, body []byte) []string {
	path, query, _ := strings.Cut(target, "?")
	if status >= 300 && path != "/readyz" {
		if err := d.validate(`{"$ref":"`+schemaPlace+`ErrorBody"}`, body); err != nil {
			return []string{err.Error()}
		}
		return nil
	}
	op, ok := d.find(method, strings.TrimSuffix(path, "/"))
	if !ok {
		return []string{"the document does not have it"}
	}
	if len(body) == 0 {
		return nil
	}
	answer, ok := op.Responses["200"]
	schema := string(answer.Content["application/json"].Schema)
	if op.Actions != nil {
		name := ""
		for p := range strings.SplitSeq(query, "&") {
			if v, ok := strings.CutPrefix(p, "action="); ok {
				name = v
			}
		}
		schema = string(op.Actions[name].Response)
	}
	if !ok || schema == "" || schema == "null" {
		return []string{"the document says that nothing is answered"}
	}
	if err := d.validate(schema, body); err != nil {
		return []string{err.Error()}
	}
	return nil
}

// TestOpenAPIIsWhatIsServed tries every method on every path, described or not: what is served is described, and what is described is served.
func TestOpenAPIIsWhatIsServed(t *testing.T) {
	mem := catalog.NewMem()
	defer mem.Close()
	h := New(Config{Catalog: mem, Node: "n1", Version: "v1", OperationTimeout: 1})
	d, err := theDocument()
	if err != nil {
		t.Fatal(err)
	}
	served := func(method, target string) bool {
		w := httptest.NewRecorder()
		h.ServeHTTP(w, onLoopback(httptest.NewRequest(method, target, strings.NewReader("{}"))))
		var e ErrorBody
		_ = json.Unmarshal(w.Body.Bytes(), &e)
		return e.Reason != CodeMethod && !strings.HasPrefix(e.Message, "there is nothing at") && !strings.Contains(e.Message, "there is no action")
	}
	paths := slices.Sorted(maps.Keys(d.paths))
	for plural := range h.nouns {
		paths = append(paths, "/v1/"+plural, "/v1/"+plural+"/{name}", "/v1/"+plural+"/{name}/download", "/v1/"+plural+"/{name}/x")
	}
	for _, path := range append(paths, "/v2", "/v1/nothing", "/") {
		target := strings.NewReplacer("{collection}", "volumes", "{period}", "1s", "{", "", "}", "").Replace(path)
		for _, method := range []string{"GET", "HEAD", "POST", "PUT", "DELETE", "PATCH"} {
			op, described := d.find(method, target)
			if method == "HEAD" && strings.Count(path, "/") < 2 {
				continue // beside every plain GET; not worth describing
			}
			query := ""
			if len(op.Actions) > 0 {
				query = "?action=" + slices.Sorted(maps.Keys(op.Actions))[0]
			}
			if got := served(method, target+query); got != described {
				t.Errorf("%s %s: served %v, described %v", method, target, got, described)
			}
		}
	}
	for plural, n := range h.nouns {
		op, ok := d.find("POST", "/v1/"+plural+"/x")
		if !ok {
			op, _ = d.find("POST", "/v1/"+plural+"/{name}")
		}
		if fmt.Sprint(slices.Sorted(maps.Keys(op.Actions))) != fmt.Sprint(slices.Sorted(maps.Keys(n.actions))) {
			t.Errorf("%s: actions described %v, served %v", plural, op.Actions, n.actions)
		}
		for name, a := range op.Actions {
			if !served("POST", "/v1/"+plural+"/x?action="+name) {
				t.Errorf("%s: action %s is described and not served", plural, name)
			}
			if !slices.Contains(op.Parameters[0].Schema.Enum, name) {
				t.Errorf("%s: action %s cannot be asked for", plural, name)
			}
			if a.Reads != n.actions[name].reads || a.Unbuilt != n.actions[name].unbuilt {
				t.Errorf("%s: action %s is described wrongly: %+v", plural, name, a)
			}
		}
	}
}

// TestOpenAPIIsWhole wants every reference to lead somewhere, every operation to have its own id, and the fields' comments to have arrived.
func TestOpenAPIIsWhole(t *testing.T) {
	inBubble(t, func(x *fixture) {
		text := string(x.h.document())
		for rest := text; ; {
			i := strings.Index(rest, schemaPlace)
			if i < 0 {
				break
			}
			rest = rest[i+len(schemaPlace):]
			name, _, _ := strings.Cut(rest, `"`)
			if err := x.schema.validate(`{"$ref":"`+schemaPlace+name+`"}`, []byte(`0`)); err == nil || !strings.Contains(err.Error(), "type") {
				t.Errorf("schema %s: %v", name, err)
			}
		}
		ids := map[string]string{}
		for path, methods := range x.schema.paths {
			for method, raw := range methods {
				var op describedOperation
				if method == "parameters" {
					continue
				}
				if err := json.Unmarshal(raw, &op); err != nil || op.OperationID == "" || op.Description == "" || ids[op.OperationID] != "" {
					t.Errorf("%s %s: id %q (also %s), %v", method, path, op.OperationID, ids[op.OperationID], err)
				}
				ids[op.OperationID] = method + " " + path
			}
		}
		for _, words := range []string{"decimal bytes", "a new file, absolute, on the node", "RFC 3339", "Collection is a list of resources. Data is never null."} {
			if !strings.Contains(text, words) {
				t.Errorf("the document does not say %q", words)
			}
		}
	})
}

// TestDocumentNotices keeps the validator honest.
func TestDocumentNotices(t *testing.T) {
	inBubble(t, func(x *fixture) {
		good := string(x.want(200, "GET", "/v1/about", "").raw)
		if p := x.schema.check("GET", "/v1/about", 200, []byte(good)); len(p) > 0 {
			t.Error(p)
		}
		for what, bad := range map[string]string{
			"a field too many": strings.Replace(good, `"node":`, `"extra":1,"node":`, 1),
			"a field too few":  strings.Replace(good, `"version":`, `"versio":`, 1),
			"a wrong type":     strings.Replace(good, `"id":"n1"`, `"id":1`, 1),
			"null":             strings.Replace(good, `"actions":{}`, `"actions":null`, 1),
		} {
			if bad == good || len(x.schema.check("GET", "/v1/about", 200, []byte(bad))) == 0 {
				t.Errorf("%s is not noticed: %s", what, bad)
			}
		}
		if len(x.schema.check("GET", "/v1/nothing", 200, []byte(good))) == 0 {
			t.Error("a path that is not described is not noticed")
		}
	})
}

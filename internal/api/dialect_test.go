package api

import (
	"encoding/json"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"
	"testing"
)

// checkAnswer is what the dialect's Python client does with an answer, as a list of what would make it stumble: it turns every object with a string "type" into an
// object with a method for each link and action, counts anything with a list "data" as a list, and reads errors from their body.
func checkAnswer(status int, header http.Header, body []byte) []string {
	var problems []string
	bad := func(format string, args ...any) { problems = append(problems, fmt.Sprintf(format, args...)) }
	if len(body) == 0 {
		if status != http.StatusOK {
			bad("status %d without a body", status)
		}
		return problems
	}
	if header.Get("Content-Type") != "application/json" {
		bad("content type %q", header.Get("Content-Type"))
	}
	var v any
	if err := json.Unmarshal(body, &v); err != nil {
		return append(problems, "not JSON: "+err.Error())
	}
	top, ok := v.(map[string]any)
	if !ok {
		return append(problems, "no object")
	}
	if status >= 300 && top["type"] != "error" && top["type"] != "health" {
		bad("status %d with type %v", status, top["type"])
	}
	if top["type"] == "error" {
		if s, ok := top["status"].(float64); !ok || int(s) != status {
			bad("the error says status %v, the answer %d", top["status"], status)
		}
		if m, _ := top["message"].(string); m == "" {
			bad("an error without a message")
		}
	}
	if top["type"] == "collection" {
		if _, ok := top["data"].([]any); !ok {
			bad("a collection whose data is %T", top["data"])
		}
		if top["resourceType"] == "" {
			bad("a collection of nothing")
		}
	}
	checkValue("", v, bad)
	return problems
}

// shadowed are names of methods of a Python dict: a field of that name hides the method, which clients call.
func shadowed(key string) bool {
	return slices.Contains([]string{"items", "keys", "values", "get", "pop", "update", "copy", "clear", "setdefault", "popitem", "fromkeys"}, key)
}

func checkValue(path string, v any, bad func(string, ...any)) {
	switch v := v.(type) {
	case nil:
		bad("%s is null", path)
	case []any:
		for i, e := range v {
			checkValue(fmt.Sprintf("%s[%d]", path, i), e, bad)
		}
	case map[string]any:
		if _, typed := v["type"].(string); typed {
			checkLinks(path, v, bad)
		}
		for key, e := range v {
			if shadowed(key) {
				bad("%s.%s hides a method of the client's object", path, key)
			}
			checkValue(path+"."+key, e, bad)
		}
	}
}

// checkLinks wants links and actions to be maps of absolute URLs, or not there; an action's name must be no field's.
func checkLinks(path string, v map[string]any, bad func(string, ...any)) {
	for _, what := range []string{"links", "actions"} {
		raw, there := v[what]
		if !there {
			continue
		}
		m, ok := raw.(map[string]any)
		if !ok {
			bad("%s.%s is %T", path, what, raw)
			continue
		}
		for name, target := range m {
			s, _ := target.(string)
			u, err := url.Parse(s)
			if err != nil || !u.IsAbs() || u.Host == "" {
				bad("%s.%s.%s is no absolute URL: %q", path, what, name, s)
				continue
			}
			if what == "actions" {
				if _, clash := v[name]; clash || u.Query().Get("action") != name {
					bad("%s.actions.%s: %q", path, name, s)
				}
			}
		}
	}
	for _, key := range []string{"id", "links", "actions"} {
		if _, ok := v[key]; !ok && v["type"] == "volume" {
			bad("%s has no %s", path, key)
		}
	}
}

// TestDialectCheckerNotices keeps the checker honest.
func TestDialectCheckerNotices(t *testing.T) {
	header := http.Header{"Content-Type": {"application/json"}}
	for _, c := range []struct {
		status int
		body   string
	}{
		{200, `[]`}, {200, `{`}, {404, `{"type":"volume"}`}, {404, ``}, {200, `{"type":"collection","resourceType":"x","data":null}`},
		{200, `{"type":"volume","id":"a","links":null,"actions":{}}`}, {200, `{"type":"x","links":{"self":"/v1/x"}}`}, {200, `{"a":{"items":1}}`},
		{200, `{"type":"x","actions":{"go":"http://h/x?action=stay"}}`}, {200, `{"a":[{"b":null}]}`}, {500, `{"type":"error","status":404,"message":"x"}`},
	} {
		if len(checkAnswer(c.status, header, []byte(c.body))) == 0 {
			t.Errorf("%d %s went through", c.status, c.body)
		}
	}
}

// TestSchemas walks the schemas as the client does when it starts: every method it would make must lead somewhere.
func TestSchemas(t *testing.T) {
	inBubble(t, func(x *fixture) {
		a := x.want(200, "GET", "/v1/schemas", "")
		if got := a.header.Get("X-API-Schemas"); got != "http://node1:9500/v1/schemas" {
			t.Errorf("X-API-Schemas is %q", got)
		}
		want := map[string][2]string{ // id -> collection methods, resource methods
			"schema": {"GET", "GET"}, "volume": {"GET,POST", "GET,DELETE"}, "backingImage": {"GET,POST", "GET,DELETE"}, "node": {"GET", "GET,PUT,DELETE"},
			"setting": {"GET", "GET,PUT"}, "engineImage": {"GET,POST", "GET,DELETE"}, "instanceManager": {"GET", "GET"},
			"recurringJob": {"GET,POST", "GET,PUT,DELETE"}, "volumeRecurringJob": {"GET", "GET"}, "backupTarget": {"GET,POST", "GET,PUT,DELETE"},
			"backupVolume": {"GET", "GET,PUT,DELETE"}, "backupBackingImage": {"GET", "GET,DELETE"}, "systemBackup": {"GET,POST", "GET,DELETE"},
			"systemRestore": {"GET,POST", "GET,DELETE"}, "supportBundle": {"GET,POST", "GET"},
		}
		for _, e := range a.obj["data"].([]any) {
			s := e.(map[string]any)
			id := s["id"].(string)
			join := func(key string) string {
				var out []string
				for _, m := range s[key].([]any) {
					out = append(out, m.(string))
				}
				return strings.Join(out, ",")
			}
			if s["type"] != "schema" || [2]string{join("collectionMethods"), join("resourceMethods")} != want[id] {
				t.Errorf("schema %s: type %v, methods %s and %s, want %v", id, s["type"], join("collectionMethods"), join("resourceMethods"), want[id])
			}
			delete(want, id)
			link := s["links"].(map[string]any)["collection"].(string)
			if list := x.want(200, "GET", strings.TrimPrefix(link, "http://node1:9500"), ""); list.str("type") != "collection" {
				t.Errorf("%s is no collection: %s", link, list.raw)
			}
			if one := x.want(200, "GET", "/v1/schemas/"+id, ""); one.str("id") != id {
				t.Errorf("schema %s: %s", id, one.raw)
			}
		}
		for id := range want {
			t.Errorf("no schema %s", id)
		}
		x.refused(CodeNotFound, "GET", "/v1/schemas/nothing", "")
	})
}

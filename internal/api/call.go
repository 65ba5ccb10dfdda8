package api

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"reflect"
	"strings"
)

// maxBody bounds a request's body.
const maxBody = 1 << 20

// call is one request on its way through a handler.
type call struct {
	r      *http.Request
	w      http.ResponseWriter // only for what MaxBytesReader needs and headers; send writes the answer
	base   string              // http://host:port, for links
	noun   *noun
	id     string            // of the resource; "" for the collection
	vars   map[string]string // of a way
	access access
}

// handler answers one kind of request: a value to be sent as JSON, nil for an empty 200, or an error.
type handler func(c *call) (any, error)

// body reads the request's JSON object into a struct pointer. No body at all is an empty object. Names match in any case, unknown fields are ignored, no
// Content-Type is asked for (clients of the dialect send none). A wrong type is CodeInvalid and names the field.
func (c *call) body(into any) error {
	data, err := io.ReadAll(http.MaxBytesReader(c.w, c.r.Body, maxBody))
	if err != nil {
		var large *http.MaxBytesError
		if errors.As(err, &large) {
			return Because(err, CodeTooLarge, "the request's body is over the limit of 1 MiB")
		}
		return Because(err, CodeInvalid, "the request's body could not be read: %v", err)
	}
	data = bytes.TrimSpace(data)
	if len(data) == 0 {
		return nil
	}
	err = json.Unmarshal(data, into)
	var wrong *json.UnmarshalTypeError
	var syntax *json.SyntaxError
	switch {
	case err == nil:
		return nil
	case errors.As(err, &wrong) && wrong.Field == "":
		return Because(err, CodeInvalid, "the request's body must be a JSON object, not %s", word(wrong.Value))
	case errors.As(err, &wrong):
		return Because(err, CodeInvalid, "field %s must be %s, not %s", quote(wrong.Field), wanted(wrong.Type), word(wrong.Value))
	case errors.As(err, &syntax):
		return Because(err, CodeInvalid, "the request's body is not JSON: %v at byte %d", syntax, syntax.Offset)
	}
	return Because(err, CodeInvalid, "the request's body cannot be read: %v", err)
}

// wanted says a Go type in JSON's words.
func wanted(t reflect.Type) string {
	switch t.Kind() {
	case reflect.String:
		return "a string"
	case reflect.Bool:
		return "true or false"
	case reflect.Int, reflect.Int64:
		return "a whole number in range"
	case reflect.Slice:
		return "a list"
	case reflect.Map, reflect.Struct:
		return "an object"
	}
	return "a " + t.Kind().String()
}

// word says what was found; the decoder speaks of "number 1.5", "bool" and so on.
func word(found string) string {
	switch found {
	case "bool":
		return "true or false"
	case "array":
		return "a list"
	case "object":
		return "an object"
	}
	if len(found) > 60 {
		found = found[:60] + "…"
	}
	return "a " + found
}

// baseURL is what links begin with: from the Host header, or what a proxy in front says it was.
func baseURL(r *http.Request) string {
	first := func(header string) string {
		v, _, _ := strings.Cut(r.Header.Get(header), ",")
		return strings.TrimSpace(v)
	}
	scheme := "http"
	if r.TLS != nil {
		scheme = "https"
	}
	if p := strings.ToLower(first("X-Forwarded-Proto")); p == "http" || p == "https" {
		scheme = p
	}
	host := first("X-Forwarded-Host")
	if !isHost(host) {
		host = r.Host
	}
	if !isHost(host) {
		host = "localhost"
	}
	port := first("X-Forwarded-Port")
	if _, _, err := net.SplitHostPort(host); err != nil && port != "" && len(port) <= 5 && strings.Trim(port, "0123456789") == "" {
		if scheme == "http" && port != "80" || scheme == "https" && port != "443" {
			host += ":" + port
		}
	}
	return scheme + "://" + host
}

// isHost keeps anything out of links that is no host and port.
func isHost(s string) bool {
	return s != "" && len(s) < 256 && strings.Trim(s, "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.-_:[]%") == ""
}

// url is the absolute URL of a path below /v1.
func (c *call) url(segments ...string) string {
	u := c.base + "/v1"
	for _, s := range segments {
		u += "/" + url.PathEscape(s)
	}
	return u
}

// resource makes the common part of a resource of the called noun.
func (c *call) resource(id string, actions ...string) Resource {
	return c.resourceOf(c.noun, id, actions...)
}

func (c *call) resourceOf(n *noun, id string, actions ...string) Resource {
	self := c.url(n.plural, id)
	res := Resource{ID: id, Type: n.schema, Links: map[string]string{"self": self}, Actions: make(map[string]string, len(actions))}
	for _, a := range actions {
		res.Actions[a] = self + "?action=" + a
	}
	return res
}

// collect makes a collection of the called noun.
func collect[T any](c *call, resourceType string, data []T) Collection[T] {
	if data == nil {
		data = []T{}
	}
	self := c.url(c.noun.plural)
	if c.id != "" {
		self = c.url(c.noun.plural, c.id)
	}
	return Collection[T]{Type: "collection", ResourceType: resourceType, Links: map[string]string{"self": self}, Actions: map[string]string{}, Data: data}
}

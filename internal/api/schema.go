package api

import (
	"cmp"
	"net/http"
	"slices"
)

// schemaNouns lists the nouns that have a schema, sorted by its id.
func (h *Handler) schemaNouns() []*noun {
	var out []*noun
	for _, n := range h.nouns {
		if !n.hidden {
			out = append(out, n)
		}
	}
	slices.SortFunc(out, func(a, b *noun) int { return cmp.Compare(a.schema, b.schema) })
	return out
}

// schemaList is where a client of the dialect begins: it makes its methods from what it finds here.
func (h *Handler) schemaList(c *call) (any, error) {
	c.w.Header().Set("X-API-Schemas", c.url("schemas"))
	var data []Schema
	for _, n := range h.schemaNouns() {
		data = append(data, h.schemaOf(c, n))
	}
	return collect(c, c.noun.schema, data), nil
}

func (h *Handler) schemaGet(c *call) (any, error) {
	for _, n := range h.schemaNouns() {
		if n.schema == c.id {
			return h.schemaOf(c, n), nil
		}
	}
	return nil, Failure(CodeNotFound, "schema %s: there is no such type", quote(c.id))
}

// schemaOf makes the resource from what a noun can do.
func (h *Handler) schemaOf(c *call, n *noun) Schema {
	s := Schema{
		Resource: c.resourceOf(&noun{schema: "schema", plural: "schemas"}, n.schema), PluralName: n.plural, CollectionMethods: []string{}, ResourceMethods: []string{},
		ResourceFields: map[string]any{}, CollectionFilters: map[string]any{},
	}
	s.Links["collection"] = c.url(n.plural)
	add := func(list *[]string, method string, f handler) {
		if f != nil {
			*list = append(*list, method)
		}
	}
	add(&s.CollectionMethods, http.MethodGet, n.list)
	add(&s.CollectionMethods, http.MethodPost, n.create)
	add(&s.ResourceMethods, http.MethodGet, n.get)
	add(&s.ResourceMethods, http.MethodPut, n.update)
	add(&s.ResourceMethods, http.MethodDelete, n.remove)
	return s
}

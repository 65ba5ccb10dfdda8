package api

import (
	"errors"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/identity"
)

// maxTokens bounds how many tokens there may be: every request over TLS looks at all of them.
const maxTokens = 1000

func tokenKey(name string) catalog.Key {
	return catalog.Key{Kind: catalog.KindToken, Part: catalog.Wanted, Name: name}
}

// token makes the resource, without the secret, which nobody has.
func (h *Handler) token(c *call, t catalog.Token) Token {
	return Token{
		Resource: c.resource(t.Name), Name: t.Name, ReadOnly: t.ReadOnly, Created: stamp(t.Created), Expires: stamp(t.Expires),
		Expired: !t.Expires.IsZero() && !h.cfg.Now().Before(t.Expires),
	}
}

func (h *Handler) tokenList(c *call) (any, error) {
	l, err := list[catalog.Token, struct{}](c.r.Context(), h, catalog.KindToken)
	if err != nil {
		return nil, err
	}
	data := []Token{}
	for _, name := range l.names() {
		data = append(data, h.token(c, l.wanted[name]))
	}
	return collect(c, c.noun.schema, data), nil
}

func (h *Handler) tokenGet(c *call) (any, error) {
	t, ok, err := find[catalog.Token](c.r.Context(), h.cfg.Catalog, tokenKey(c.id))
	if err == nil && !ok {
		err = Failure(CodeNotFound, "token %s: there is no such token", quote(c.id))
	}
	if err != nil {
		return nil, err
	}
	return h.token(c, t), nil
}

type tokenInput struct {
	Name     string `json:"name"`     // of the token, to tell it from others
	ReadOnly bool   `json:"readOnly"` // good for reading only, guests' data included
	Expires  string `json:"expires"`  // RFC 3339; "": never
}

// tokenCreate makes a token and shows its secret, this once.
func (h *Handler) tokenCreate(c *call) (any, error) {
	var in tokenInput
	if err := c.body(&in); err != nil {
		return nil, err
	}
	if err := checkName("token", in.Name); err != nil {
		return nil, err
	}
	t := catalog.Token{Name: in.Name, ReadOnly: in.ReadOnly, Created: h.cfg.Now().UTC()}
	if in.Expires != "" {
		end, err := time.Parse(time.RFC3339, in.Expires)
		if err != nil || !end.After(t.Created) {
			return nil, Failure(CodeInvalid, "token %s: expires is %s; a time to come is wanted, such as %s, or nothing", in.Name, quote(in.Expires),
				stamp(t.Created.AddDate(0, 3, 0)))
		}
		t.Expires = end.UTC()
	}
	l, err := list[catalog.Token, struct{}](c.r.Context(), h, catalog.KindToken)
	if err != nil {
		return nil, err
	}
	if len(l.wanted) >= maxTokens {
		return nil, Failure(CodeConflict, "token %s: there are %d tokens already; delete some that are not used", in.Name, len(l.wanted))
	}
	secret, sum, err := identity.NewToken(h.cfg.Random)
	if err != nil {
		return nil, err
	}
	t.SHA256 = sum
	_, err = catalog.Write(c.r.Context(), h.cfg.Catalog, tokenKey(t.Name), t, 0)
	if errors.Is(err, catalog.ErrConflict) {
		return nil, Failure(CodeExists, "token %s exists already; delete it first, or choose another name", t.Name)
	}
	if err != nil {
		return nil, err
	}
	res := h.token(c, t)
	res.Token = secret
	// No cache may keep it.
	c.w.Header().Set("Cache-Control", "no-store")
	return res, nil
}

// tokenDelete makes a token invalid at once; streams that it opened end within their next sign of life.
func (h *Handler) tokenDelete(c *call) (any, error) {
	e, err := h.cfg.Catalog.Get(c.r.Context(), tokenKey(c.id))
	if err == nil {
		err = h.cfg.Catalog.Delete(c.r.Context(), e.Key, e.Rev)
	}
	return nil, h.gone(c, err)
}

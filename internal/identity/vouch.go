package identity

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/pem"
	"errors"
	"fmt"
)

// Vouch shows that whoever asks for a new certificate has the key of the one that this node has, which may have ended: that certificate (PEM) and the signature of its key over the SHA-256 of the
// request (ASN.1, ECDSA). ErrFile if the key is of another kind.
func (t *NodeTLS) Vouch(requestPEM []byte) (certPEM, signature []byte, err error) {
	c, err := t.reload.current()
	if err != nil {
		return nil, nil, err
	}
	key, ok := c.PrivateKey.(*ecdsa.PrivateKey)
	if !ok {
		return nil, nil, fmt.Errorf("the node's key is a %T: %w", c.PrivateKey, ErrFile)
	}
	sum := sha256.Sum256(requestPEM)
	if signature, err = ecdsa.SignASN1(rand.Reader, key, sum[:]); err != nil {
		return nil, nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: pemCertificate, Bytes: c.Leaf.Raw}), signature, nil
}

// Vouched tells which node Vouch was said on: one whose certificate this authority signed, whether it is still good or not. ErrRequest if anything does not fit.
func (a *Authority) Vouched(requestPEM, certPEM, signature []byte) (Node, error) {
	bad := func(err error) (Node, error) {
		return Node{}, fmt.Errorf("a certificate of before: %w: %w", ErrRequest, err)
	}
	if len(certPEM) > maxRequest || len(signature) > maxRequest {
		return bad(errors.New("too long"))
	}
	leaf, err := ParseCertificate(certPEM)
	if err != nil {
		return bad(err)
	}
	if err := leaf.CheckSignatureFrom(a.cert); err != nil {
		return bad(err)
	}
	key, ok := leaf.PublicKey.(*ecdsa.PublicKey)
	sum := sha256.Sum256(requestPEM)
	if !ok || !ecdsa.VerifyASN1(key, sum[:], signature) {
		return bad(errors.New("its key did not sign the request"))
	}
	n, err := NodeOf(leaf)
	if err != nil {
		return bad(err)
	}
	return n, nil
}

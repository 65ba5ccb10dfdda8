package identity

import (
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/base64"
	"encoding/hex"
	"fmt"
	"io"
	"strings"
)

// TokenPrefix begins every token's secret, so that one that lies where it should not can be told from other text.
const TokenPrefix = "ashlar_"

// tokenBytes is how many of a secret's bytes are random.
const tokenBytes = 32

// NewToken makes a token: the secret, which is shown once (TokenPrefix and 43 letters, safe in headers and files), and its SHA-256 in hex, which is what is kept. A
// plain hash is enough for 256 random bits. random nil means the kernel's generator.
func NewToken(random io.Reader) (secret, sum string, err error) {
	if random == nil {
		random = rand.Reader
	}
	var b [tokenBytes]byte
	if _, err := io.ReadFull(random, b[:]); err != nil {
		return "", "", fmt.Errorf("new token: %w", err)
	}
	secret = TokenPrefix + base64.RawURLEncoding.EncodeToString(b[:])
	return secret, TokenSum(secret), nil
}

// TokenSum is the SHA-256 of a secret, in hex.
func TokenSum(secret string) string {
	sum := sha256.Sum256([]byte(secret))
	return hex.EncodeToString(sum[:])
}

// TokenMatches tells whether a secret is the one that a sum was made of, in a time that does not depend on how much of it is right.
func TokenMatches(secret, sum string) bool {
	return subtle.ConstantTimeCompare([]byte(TokenSum(secret)), []byte(sum)) == 1
}

// LooksLikeToken tells whether some text could be a token's secret.
func LooksLikeToken(s string) bool {
	return strings.HasPrefix(s, TokenPrefix) && len(s) == len(TokenPrefix)+base64.RawURLEncoding.EncodedLen(tokenBytes)
}

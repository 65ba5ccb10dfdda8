package image

import (
	"crypto/sha256"
	"crypto/sha512"
	"encoding/hex"
	"fmt"
	"hash"
	"strings"
)

// Checksum names the file a user wants, byte for byte as it is received.
type Checksum struct {
	// Algorithm is "sha512" or "sha256".
	Algorithm string
	// Hex is the sum in lower-case hex.
	Hex string
}

// ParseChecksum takes "sha512:HEX", "sha256:HEX" or bare HEX of 128 or 64 digits, in either case; the empty string gives the zero Checksum,
// which matches everything. Anything else is ErrUnsupported.
func ParseChecksum(s string) (Checksum, error) {
	if s == "" {
		return Checksum{}, nil
	}
	algorithm, digits, named := strings.Cut(strings.ToLower(s), ":")
	if !named {
		digits = algorithm
		algorithm = map[int]string{2 * sha512.Size: "sha512", 2 * sha256.Size: "sha256"}[len(digits)]
	}
	want := map[string]int{"sha512": 2 * sha512.Size, "sha256": 2 * sha256.Size}[algorithm]
	if _, err := hex.DecodeString(digits); err != nil || want == 0 || len(digits) != want {
		return Checksum{}, fmt.Errorf("checksum %.160q: want sha512: and 128 hex digits, or sha256: and 64: %w", s, ErrUnsupported)
	}
	return Checksum{Algorithm: algorithm, Hex: digits}, nil
}

// String gives "sha512:HEX", or the empty string for the zero Checksum.
func (c Checksum) String() string {
	if c.Hex == "" {
		return ""
	}
	return c.Algorithm + ":" + c.Hex
}

// sums hashes a file as it is received: always SHA-512, which the REST dialect shows, and SHA-256 if that was asked for.
type sums struct {
	want   Checksum
	sha512 hash.Hash
	sha256 hash.Hash // nil unless wanted
}

func newSums(want Checksum) *sums {
	s := &sums{want: want, sha512: sha512.New()}
	if want.Algorithm == "sha256" {
		s.sha256 = sha256.New()
	}
	return s
}

// Write never fails.
func (s *sums) Write(p []byte) (int, error) {
	s.sha512.Write(p)
	if s.sha256 != nil {
		s.sha256.Write(p)
	}
	return len(p), nil
}

// SHA512 is the sum of what was written so far, in hex.
func (s *sums) SHA512() string { return hex.EncodeToString(s.sha512.Sum(nil)) }

// check compares what was received with what was wanted: ErrChecksum, with both.
func (s *sums) check() error {
	var got string
	switch s.want.Algorithm {
	case "":
		return nil
	case "sha256":
		got = hex.EncodeToString(s.sha256.Sum(nil))
	default:
		got = s.SHA512()
	}
	if got != s.want.Hex {
		return fmt.Errorf("the file's %s is %s, asked for was %s: %w", s.want.Algorithm, got, s.want.Hex, ErrChecksum)
	}
	return nil
}

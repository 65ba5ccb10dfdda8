package api

import (
	"fmt"
	"math/big"
	"strings"
)

// Limits of a volume's size, in bytes.
const (
	// SizeStep is what sizes are rounded up to.
	SizeStep = 2 << 20
	// MinSize is the least size; anything above zero and below it becomes it.
	MinSize = 10 << 20
	// MaxSize is the largest size; anything above it is refused.
	MaxSize = 15 << 40
)

// ParseSize reads a size as clients write it: decimal bytes ("33554432") or a Kubernetes quantity ("10Gi", "32Mi", "1.5G", "1e9"). A fraction of a byte
// rounds up. Zero, negative numbers, anything over MaxSize and anything else is CodeInvalid. The result is not rounded to SizeStep: see RoundSize.
func ParseSize(s string) (int64, error) {
	bad := func(why string) error {
		return Failure(CodeInvalid, "size %s %s; give bytes or a quantity such as 10Gi", quote(s), why)
	}
	if len(s) > 40 {
		return 0, bad("is too long to be a size")
	}
	if strings.HasPrefix(s, "-") {
		return 0, bad("is negative")
	}
	end := strings.IndexFunc(s, func(r rune) bool { return (r < '0' || r > '9') && r != '.' })
	if end < 0 {
		end = len(s)
	}
	factor, ok := unit(s[end:])
	// SetString would also take fractions, exponents and underscores: only digits and one point reach it.
	number, ok2 := new(big.Rat).SetString(s[:end])
	if !ok || !ok2 {
		return 0, bad("cannot be read")
	}
	number.Mul(number, factor)
	up := new(big.Int).Add(number.Num(), new(big.Int).Sub(number.Denom(), big.NewInt(1)))
	bytes := up.Quo(up, number.Denom())
	switch {
	case bytes.Sign() == 0:
		return 0, bad("is zero")
	case !bytes.IsInt64() || bytes.Int64() > MaxSize:
		return 0, bad("is over the limit of 15 TiB")
	}
	return bytes.Int64(), nil
}

// unit returns what a quantity's suffix multiplies by.
func unit(suffix string) (*big.Rat, bool) {
	power := func(base, exp int64) (*big.Rat, bool) {
		return new(big.Rat).SetInt(new(big.Int).Exp(big.NewInt(base), big.NewInt(exp), nil)), true
	}
	switch suffix {
	case "":
		return power(1, 0)
	case "k":
		return power(10, 3)
	case "M":
		return power(10, 6)
	case "G":
		return power(10, 9)
	case "T":
		return power(10, 12)
	case "P":
		return power(10, 15)
	case "E":
		return power(10, 18)
	case "Ki":
		return power(2, 10)
	case "Mi":
		return power(2, 20)
	case "Gi":
		return power(2, 30)
	case "Ti":
		return power(2, 40)
	case "Pi":
		return power(2, 50)
	case "Ei":
		return power(2, 60)
	}
	// An exponent of one or two digits: more would be over the limit anyway, or below a byte.
	if len(suffix) < 2 || len(suffix) > 3 || (suffix[0] != 'e' && suffix[0] != 'E') || strings.Trim(suffix[1:], "0123456789") != "" {
		return nil, false
	}
	var exp int64
	for _, d := range suffix[1:] {
		exp = exp*10 + int64(d-'0')
	}
	return power(10, exp)
}

// RoundSize rounds a size up to SizeStep, and to MinSize at least.
func RoundSize(n int64) int64 {
	return max(MinSize, (n+SizeStep-1)/SizeStep*SizeStep)
}

// FormatSize says a size for people, with the bytes where one decimal does not say it exactly: "10 GiB", "1.5 GiB", "2.4 GiB (2600000001 bytes)".
func FormatSize(n int64) string {
	unit, name := int64(1), "bytes"
	for _, next := range []string{"KiB", "MiB", "GiB", "TiB", "PiB"} {
		if n/unit < 1024 {
			break
		}
		unit, name = unit<<10, next
	}
	short := strings.TrimSuffix(fmt.Sprintf("%.1f", float64(n)/float64(unit)), ".0") + " " + name
	if n%unit*10%unit == 0 {
		return short
	}
	return fmt.Sprintf("%s (%d bytes)", short, n)
}

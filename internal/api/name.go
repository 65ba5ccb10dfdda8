package api

import (
	"strconv"
	"strings"
)

// maxName bounds names: a volume's name is part of a socket's path, of which the kernel takes 108 bytes.
const maxName = 63

// quote shows foreign text in a message: in quotes, control characters escaped, long text cut.
func quote(s string) string {
	if len(s) > 80 {
		s = s[:80] + "…"
	}
	return strconv.QuoteToASCII(s)
}

// checkName wants a name of a volume or image: lower-case letters, digits, '-' and '.', a letter or digit at both ends, no "..". kind goes into the message.
func checkName(kind, name string) error {
	if name == "" {
		return Failure(CodeInvalid, "%s: a name is missing", kind)
	}
	if len(name) > maxName {
		return Failure(CodeInvalid, "%s name %s is %d bytes long; at most %d are allowed", kind, quote(name), len(name), maxName)
	}
	lower := func(r rune) bool { return r >= 'a' && r <= 'z' || r >= '0' && r <= '9' }
	return checkLetters(kind, name, lower, "lower-case letters, digits, '-' and '.'")
}

// checkSnapshotName wants a snapshot's name: like checkName with upper-case letters and '_' too, and not the name of the present.
func checkSnapshotName(name string) error {
	if name == headName {
		return Failure(CodeInvalid, "snapshot name %q is taken: it is the present", headName)
	}
	if len(name) > maxName {
		return Failure(CodeInvalid, "snapshot name %s is %d bytes long; at most %d are allowed", quote(name), len(name), maxName)
	}
	letter := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || r == '_'
	}
	return checkLetters("snapshot", name, letter, "letters, digits, '_', '-' and '.'")
}

func checkLetters(kind, name string, letter func(rune) bool, allowed string) error {
	bad := func(why string) error {
		return Failure(CodeInvalid, "%s name %s %s; allowed are %s, a letter or digit first and last", kind, quote(name), why, allowed)
	}
	for _, r := range name {
		if !letter(r) && r != '-' && r != '.' {
			return bad("has the character " + strconv.QuoteRuneToASCII(r))
		}
	}
	if name == "" || strings.ContainsAny(name[:1]+name[len(name)-1:], "-.") {
		return bad("begins or ends with '-' or '.'")
	}
	if strings.Contains(name, "..") {
		return bad(`has ".."`)
	}
	return nil
}

// checkLabels bounds what a client may hang on an object.
func checkLabels(labels map[string]string) error {
	if len(labels) > 64 {
		return Failure(CodeInvalid, "labels: %d are too many; at most 64 are allowed", len(labels))
	}
	for k, v := range labels {
		if k == "" || len(k) > 253 || len(v) > 1024 {
			return Failure(CodeInvalid, "label %s: a key has 1 to 253 bytes, a value at most 1024", quote(k))
		}
	}
	return nil
}

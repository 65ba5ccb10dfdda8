package hold

import "testing"

func TestDataUnit(t *testing.T) {
	for version, want := range map[string]string{
		"0.9.1": "ashlar-data@0.9.1.service", "0.3.12-gab+c~1": "ashlar-data@0.3.12-gab-c-1.service", "a b/c": "ashlar-data@a-b-c.service",
	} {
		if got := dataUnit(version); got != want {
			t.Errorf("%q: %q, want %q", version, got, want)
		}
	}
}

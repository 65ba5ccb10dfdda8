package blockdev

import (
	"context"
	"os"
	"testing"
)

// TestMain lets the test binary be the tool, and a process that serves and can be killed.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "blockdev":
			os.Exit(Tool(context.Background(), os.Args[2:], os.Stdout))
		case "serve":
			os.Exit(serveMain(os.Args[2:]))
		}
	}
	os.Exit(m.Run())
}

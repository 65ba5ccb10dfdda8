package blockdev

import (
	"context"
	"os"
	"testing"
)

// TestMain lets the test binary be the tool, and processes that serve and can be killed, and that use what is served.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 {
		switch os.Args[1] {
		case "blockdev":
			os.Exit(Tool(context.Background(), os.Args[2:], os.Stdout))
		case "serve":
			os.Exit(serveMain(os.Args[2:]))
		case "workload":
			os.Exit(workloadMain(os.Args[2:]))
		}
	}
	os.Exit(m.Run())
}

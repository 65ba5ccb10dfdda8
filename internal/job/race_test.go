//go:build race

package job

// testMemoryBytes: the race detector maps more than any limit would allow.
const testMemoryBytes = -1

//go:build !race

package job

const testMemoryBytes = DefaultMemoryBytes

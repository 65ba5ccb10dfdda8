// Package house holds the tests that keep the architecture true: who may import whom, that every package says what it is, that functions
// stay on one screen, that nobody starts a goroutine nobody waits for, and that docs/proof.md and mutants/*.json name tests that exist. It has no code of its own.
//
// Read next: docs/tour.md, and docs/decisions for the exceptions listed in house_test.go.
package house

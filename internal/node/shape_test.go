package node

import (
	"encoding/json"
	"reflect"
	"testing"
	"time"

	"ashlar/internal/catalog"
	"ashlar/internal/replica"
)

// fill sets every field of v, however deep, to something that is not zero.
func fill(v reflect.Value) {
	switch v.Kind() {
	case reflect.Pointer:
		v.Set(reflect.New(v.Type().Elem()))
		fill(v.Elem())
	case reflect.Struct:
		if v.Type() == reflect.TypeFor[time.Time]() {
			v.Set(reflect.ValueOf(time.Date(2026, 1, 2, 3, 4, 5, 6, time.UTC)))
			return
		}
		for i := range v.NumField() {
			fill(v.Field(i))
		}
	case reflect.Slice:
		v.Set(reflect.MakeSlice(v.Type(), 1, 1))
		fill(v.Index(0))
	case reflect.Map:
		v.Set(reflect.MakeMap(v.Type()))
		value := reflect.New(v.Type().Elem()).Elem()
		fill(value)
		v.SetMapIndex(reflect.ValueOf("k").Convert(v.Type().Key()), value)
	case reflect.String:
		v.SetString("s")
	case reflect.Bool:
		v.SetBool(true)
	case reflect.Int, reflect.Int64:
		v.SetInt(7)
	case reflect.Uint64:
		v.SetUint(7)
	}
}

// TestMembershipShape holds the engine's record and the control plane's view of it together: what one writes, the other reads and writes back
// without a field lost. They are two types because the two halves of the house do not import each other.
func TestMembershipShape(t *testing.T) {
	var rec replica.Record
	fill(reflect.ValueOf(&rec).Elem())
	want, err := json.Marshal(rec)
	if err != nil {
		t.Fatal(err)
	}
	var seen catalog.Membership
	if err := json.Unmarshal(want, &seen); err != nil {
		t.Fatal(err)
	}
	back, err := json.Marshal(seen)
	if err != nil {
		t.Fatal(err)
	}
	var a, b any
	if err := json.Unmarshal(want, &a); err != nil {
		t.Fatal(err)
	}
	if err := json.Unmarshal(back, &b); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(a, b) {
		t.Errorf("the control plane loses something of the engine's record:\n%s\n%s", want, back)
	}
}

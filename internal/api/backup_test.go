package api

import (
	"net/http"
	"net/http/httptest"
	"testing"

	"ashlar/internal/catalog"
)

// TestBackupRestores: what the API sends brings every record back into an empty catalogue, and is no ordinary read.
func TestBackupRestores(t *testing.T) {
	from, to := catalog.NewMem(), catalog.NewMem()
	defer from.Close()
	defer to.Close()
	for key, v := range map[catalog.Key]any{
		{Kind: catalog.KindCluster, Part: catalog.Wanted, Name: "cluster"}: catalog.Cluster{ID: "0123456789abcdef0123456789abcdef", Format: catalog.Format},
		catalog.VolumeKey(catalog.Wanted, "db1"):                           catalog.VolumeWanted{Name: "db1", ID: "1", SizeBytes: 4096},
	} {
		if _, err := catalog.Write(t.Context(), from, key, v, 0); err != nil {
			t.Fatal(err)
		}
	}
	h := New(Config{Catalog: from, Node: "n1"})
	defer h.Close()
	srv := httptest.NewServer(h)
	defer srv.Close()
	r, err := http.Get(srv.URL + "/v1/catalogue/backup")
	if err != nil || r.StatusCode != http.StatusOK {
		t.Fatalf("%v, %v", r, err)
	}
	defer r.Body.Close()
	done, err := catalog.Restore(t.Context(), to, r.Body)
	if err != nil || done.Records != 2 {
		t.Fatalf("%+v, %v", done, err)
	}
	v, _, err := catalog.Read[catalog.VolumeWanted](t.Context(), to, catalog.VolumeKey(catalog.Wanted, "db1"))
	if err != nil || v.SizeBytes != 4096 {
		t.Fatalf("%+v, %v", v, err)
	}
}

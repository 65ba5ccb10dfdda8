package layer

import "fmt"

func (w *world) debugUnit(u int64) {
	_, r, _ := w.stack.find(u / regionUnits)
	src, _ := r.at(int(u%regionUnits), regionUnits)
	w.t.Logf("unit %d source slot %d zero %v interval %d cov %v; chain %v", u, src.slot(), src.zero(), src.interval(), src.coveredState(), w.chain)
	for _, l := range w.stack.Layers() {
		codes := make([]byte, pageBytes)
		has, err := l.readPage(u/pageUnits, codes)
		b := make([]byte, unitBytes)
		l.f.ReadAt(b, l.sb.Data.Off+u*unitBytes)
		w.t.Log(l.name, l.meta.State, has, err, codeAt(codes, int(u%pageUnits)), fmt.Sprint(readVec(b, u)))
	}
}

package client

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
)

// A stream carries the bytes of one file over a unix socket so that an end can never be mistaken for the file's: docs/formats/stream.md. Work processes and the
// agent speak it in both directions (uploads into an import, exports into a download).

// MaxStreamChunk is the most bytes a chunk of a stream may hold. Readers refuse more.
const MaxStreamChunk = 1 << 20

// The ways a stream is not whole.
var (
	// ErrStreamCut: the stream ended without its end mark: the sender died or gave up. What was read is not the file.
	ErrStreamCut = errors.New("stream was cut off before its end mark")
	// ErrStreamFormat: the bytes are no stream.
	ErrStreamFormat = errors.New("not a stream")
)

// StreamWriter cuts what is written into chunks of a stream. Not for concurrent use. It buffers nothing, so write large pieces.
type StreamWriter struct {
	w      io.Writer
	header [4]byte
	err    error
}

// NewStreamWriter begins a stream on w, which stays the caller's to close. Closing w without Finish tells the reader that the file is not whole.
func NewStreamWriter(w io.Writer) *StreamWriter { return &StreamWriter{w: w} }

// Write sends p. Its errors are those of the connection; after one nothing more can be sent.
func (s *StreamWriter) Write(p []byte) (int, error) {
	done := 0
	for done < len(p) && s.err == nil {
		n := min(len(p)-done, MaxStreamChunk)
		if s.err = s.send(p[done : done+n]); s.err == nil {
			done += n
		}
	}
	return done, s.err
}

// Finish sends the end mark: what was written is the whole file. Nothing can be written after it.
func (s *StreamWriter) Finish() error {
	if s.err != nil {
		return s.err
	}
	if err := s.send(nil); err != nil {
		s.err = err
		return err
	}
	s.err = fmt.Errorf("write after the end mark: %w", ErrStreamFormat)
	return nil
}

// send writes header and payload with one system call where w is a socket.
func (s *StreamWriter) send(p []byte) error {
	binary.BigEndian.PutUint32(s.header[:], uint32(len(p)))
	parts := net.Buffers{s.header[:], p}
	_, err := parts.WriteTo(s.w)
	return err
}

// StreamReader gives the bytes of a stream. Not for concurrent use.
type StreamReader struct {
	r    io.Reader
	left int   // of the chunk that is being read
	err  error // sticky
}

// NewStreamReader reads a stream from r, never beyond its end mark.
func NewStreamReader(r io.Reader) *StreamReader { return &StreamReader{r: r} }

// Read gives io.EOF only after the end mark. ErrStreamCut if r ended earlier, ErrStreamFormat if a chunk is longer than MaxStreamChunk, else what r says.
func (s *StreamReader) Read(p []byte) (int, error) {
	if s.err != nil || len(p) == 0 {
		return 0, s.err
	}
	if s.left == 0 {
		if s.err = s.next(); s.err != nil {
			return 0, s.err
		}
	}
	n, err := s.r.Read(p[:min(len(p), s.left)])
	s.left -= n
	if err != nil && (s.left > 0 || err != io.EOF) {
		s.err = cut(err)
		return n, s.err
	}
	return n, nil
}

// next reads a chunk's header.
func (s *StreamReader) next() error {
	var header [4]byte
	if _, err := io.ReadFull(s.r, header[:]); err != nil {
		return cut(err)
	}
	n := binary.BigEndian.Uint32(header[:])
	switch {
	case n == 0:
		return io.EOF
	case n > MaxStreamChunk:
		return fmt.Errorf("a chunk of %d bytes, the most is %d: %w", n, MaxStreamChunk, ErrStreamFormat)
	}
	s.left = int(n)
	return nil
}

func cut(err error) error {
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		return ErrStreamCut
	}
	return err
}

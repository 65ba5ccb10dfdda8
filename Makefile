# Two commands matter: `make demo` and `make test`. Both do their own set-up on a fresh Debian 12 with Go and root.

PACKAGES = qemu-utils qemu-system-x86 nbdkit libnbd-bin fio busybox-static kmod cpio e2fsprogs xfsprogs fdisk linux-image-cloud-amd64 mmdebstrap curl strace xz-utils zstd iproute2
VERSION ?= 0.3.$(shell git rev-list --count HEAD 2>/dev/null || echo 0)$(shell git describe --always --dirty 2>/dev/null | sed s/^/-g/)

.PHONY: build deb demo test bench mutants fuzz lint quick deps clean

build:                ## bin/ashlar
	go build -trimpath -ldflags "-X main.version=$(VERSION)" -o bin/ashlar ./cmd/ashlar

deb: build            ## dist/ashlar_VERSION_ARCH.deb
	go run ./packaging -ashlar bin/ashlar -version $(VERSION)

demo: deps build      ## the main job, end to end, on real input
	go run ./demo -ashlar bin/ashlar

test: deps bin/etcd build  ## every test; ends with a line that counts them
	go run ./testrun -ashlar bin/ashlar

bench: deps build     ## side by side with the peers; writes bench/results.jsonl
	go run ./bench -ashlar bin/ashlar

mutants:              ## break things on purpose; every breakage must turn a named test red
	go run ./mutants

lint:                 ## gofmt, vet, staticcheck, govulncheck, the house
	go run ./testrun -stages lint

quick:                ## no root, no network, under two minutes
	go test ./...

deps:                 ## Debian packages that demo, test and bench use; asks the network only for what is missing
	@missing=; for p in $(PACKAGES); do \
	  dpkg-query -W -f '$${db:Status-Abbrev}' $$p 2>/dev/null | grep -q '^ii' || missing="$$missing $$p"; done; \
	if [ -n "$$missing" ]; then echo "installing$$missing"; \
	  apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $$missing >/dev/null; fi

bin/etcd:             # Debian's, out of its package, for the test of an etcd that is not ours: installed, it would run as a service of this machine
	@echo "unpacking etcd-server"; rm -rf bin/etcd-server && mkdir -p bin/etcd-server && cd bin/etcd-server && \
	  { apt-get download -qq -o APT::Sandbox::User=root etcd-server 2>/dev/null || { apt-get update -qq && apt-get download -qq -o APT::Sandbox::User=root etcd-server; }; } && \
	  dpkg-deb -x etcd-server_*.deb . && mv usr/bin/etcd ../etcd && cd .. && rm -rf etcd-server

clean:
	rm -rf bin dist bench/out

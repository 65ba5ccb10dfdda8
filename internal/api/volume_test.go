package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"ashlar/internal/catalog"
)

// TestRefusals asks for what must not be given: each is refused with its code and a sentence that names what is wrong, and nothing in the catalogue changes.
func TestRefusals(t *testing.T) {
	big := strings.Repeat("a", 64)
	cases := []struct {
		code   Code
		method string
		path   string
		body   string
		words  []string
	}{
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a/b","size":"1Gi"}`, []string{`"a/b"`, `'/'`}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"..","size":"1Gi"}`, []string{`".."`}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a..b","size":"1Gi"}`, []string{`has ".."`}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a\u0007b","size":"1Gi"}`, []string{`\a`}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"Data","size":"1Gi"}`, []string{`'D'`, "lower-case"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"-a","size":"1Gi"}`, []string{"begins or ends"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"` + big + `","size":"1Gi"}`, []string{"64 bytes", "63"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"size":"1Gi"}`, []string{"name is missing"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a"}`, []string{"a size is missing"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"0"}`, []string{"volume a", "zero"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"-5Gi"}`, []string{"negative"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"ten"}`, []string{`"ten"`, "cannot be read"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"16Ti"}`, []string{"15 TiB"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"1Gi","numberOfReplicas":-1}`, []string{"numberOfReplicas is -1"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"1Gi","numberOfReplicas":"1"}`, []string{`"numberOfReplicas"`, "a whole number", "a string"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":7,"size":"1Gi"}`, []string{`"name"`, "a string", "number"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":1073741824}`, []string{`"size"`, "a string"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"1Gi","encrypted":"no"}`, []string{`"encrypted"`, "true or false"}},
		{CodeInvalid, "POST", "/v1/volumes", `["name"]`, []string{"a JSON object", "a list"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a"`, []string{"not JSON"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"1Gi"} {}`, []string{"not JSON"}},
		{CodeTooLarge, "POST", "/v1/volumes", `{"name":"` + strings.Repeat("x", 1<<20) + `"}`, []string{"1 MiB"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"1Gi","backingImage":"nothing"}`, []string{`no image "nothing"`}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"32Mi","backingImage":"debian"}`, []string{"32 MiB", "64 MiB", "debian"}},
		{CodeConflict, "POST", "/v1/volumes", `{"name":"a","backingImage":"slow"}`, []string{"wait for the import"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","backingImage":"huge"}`, []string{"16 TiB", "15 TiB"}},
		{CodeExists, "POST", "/v1/volumes", `{"name":"db1","size":"1Gi"}`, []string{"db1 exists already"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"1Gi","limits":{"iops":-1}}`, []string{"limit iops", `"-1"`}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"1Gi","limits":{"burstIOPS":10}}`, []string{"burstIOPS needs iops"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"1Gi","limits":7}`, []string{`"limits"`, "an object"}},
		{CodeNotBuilt, "POST", "/v1/volumes", `{"name":"a","size":"1Gi","frontend":"iscsi"}`, []string{"iscsi", "not built"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"1Gi","frontend":"smoke"}`, []string{`no frontend "smoke"`}},
		{CodeNotBuilt, "POST", "/v1/volumes", `{"name":"a","size":"1Gi","fromBackup":"s3://x"}`, []string{"restoring"}},
		{CodeNotSupported, "POST", "/v1/volumes", `{"name":"a","size":"1Gi","dataEngine":"v2"}`, []string{"v2"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"1Gi","nodeSelector":["s sd"]}`, []string{"nodeSelector", `"s sd"`, "no spaces"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"1Gi","diskSelector":["a,b"]}`, []string{"diskSelector", `"a,b"`}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"1Gi","diskSelector":"ssd"}`, []string{`"diskSelector"`, "a list", "a string"}},
		{CodeInvalid, "POST", "/v1/volumes", `{"name":"a","size":"1Gi","dataLocality":"near"}`, []string{"dataLocality", `"near"`, "best-effort"}},
		{CodeNotSupported, "POST", "/v1/volumes", `{"name":"a","size":"1Gi","dataLocality":"strict-local"}`, []string{"strict-local", "best-effort"}},
		{CodeInvalid, "POST", "/v1/volumes/db1?action=updateDataLocality", `{}`, []string{"dataLocality is missing"}},
		{CodeInvalid, "POST", "/v1/volumes/db1?action=updateDataLocality", `{"dataLocality":"far"}`, []string{`"far"`}},
		{CodeNotFound, "POST", "/v1/volumes/none?action=updateDataLocality", `{"dataLocality":"disabled"}`, []string{`"none"`}},
		{CodeNotFound, "GET", "/v1/volumes/nothing", ``, []string{"no such volume"}},
		{CodeNotFound, "DELETE", "/v1/volumes/nothing", ``, []string{"no such volume"}},
		{CodeNotFound, "GET", "/v1/volumes/a%2Fb", ``, []string{`"a/b"`}},
		{CodeNotFound, "POST", "/v1/volumes/db1?action=fly", `{}`, []string{`no action "fly"`}},
		{CodeNotBuilt, "POST", "/v1/volumes/db1?action=snapshotBackup", `{"name":"s"}`, []string{"backups"}},
		{CodeNotFound, "POST", "/v1/volumes/db1?action=attach", `{"hostId":"n9"}`, []string{`"n9"`, "nodes: n1"}},
		{CodeInvalid, "POST", "/v1/volumes/db1?action=attach", `{}`, []string{"hostId", "nodes: n1"}},
		{CodeInvalid, "POST", "/v1/volumes/db1?action=attach", `{"hostId":["n1"]}`, []string{`"hostId"`}},
		{CodeConflict, "POST", "/v1/volumes/live?action=attach", `{"hostId":"n1","disableFrontend":true}`, []string{"detach it before"}},
		{CodeNotFound, "POST", "/v1/volumes/nothing?action=detach", `{}`, []string{"no such volume"}},
		{CodeConflict, "POST", "/v1/volumes/db1?action=salvage", `{}`, []string{"not faulted"}},
		{CodeInvalid, "POST", "/v1/volumes/db1?action=expand", `{"size":"512Mi"}`, []string{"1 GiB", "512 MiB", "cannot shrink"}},
		{CodeInvalid, "POST", "/v1/volumes/db1?action=expand", `{}`, []string{`""`}},
		{CodeNotAttached, "POST", "/v1/volumes/db1?action=snapshotList", `{}`, []string{"db1 is detached", "attach it first"}},
		{CodeFrontend, "POST", "/v1/volumes/live?action=snapshotRevert", `{"name":"s1"}`, []string{"frontend is enabled", "disableFrontend"}},
		{CodeConflict, "POST", "/v1/volumes/bare?action=snapshotRevert", `{"name":"gone"}`, []string{"gone", "removed"}},
		{CodeNotFound, "POST", "/v1/volumes/bare?action=snapshotRevert", `{"name":"s9"}`, []string{`no snapshot "s9"`}},
		{CodeInvalid, "POST", "/v1/volumes/bare?action=snapshotRevert", `{"name":"volume-head"}`, []string{"the present"}},
		{CodeInvalid, "POST", "/v1/volumes/bare?action=snapshotRevert", `{}`, []string{"name is missing"}},
		{CodeInvalid, "POST", "/v1/volumes/bare?action=snapshotDelete", `{"name":"volume-head"}`, []string{"cannot be deleted"}},
		{CodeInvalid, "POST", "/v1/volumes/bare?action=snapshotCreate", `{"name":"volume-head"}`, []string{"the present"}},
		{CodeInvalid, "POST", "/v1/volumes/bare?action=snapshotCreate", `{"name":"a/b"}`, []string{"'/'"}},
		{CodeInvalid, "POST", "/v1/volumes/bare?action=snapshotCreate", `{"name":"a","labels":{"":"x"}}`, []string{"label"}},
		{CodeInvalid, "POST", "/v1/volumes/bare?action=snapshotCreate", `{"labels":["x"]}`, []string{`"labels"`, "an object"}},
		{CodeExists, "POST", "/v1/volumes/bare?action=snapshotCreate", `{"name":"s1"}`, []string{"s1 already"}},
		{CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"download","parameters":{}}`, []string{"url is missing"}},
		{CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"download","parameters":{"url":"ftp://h/x"}}`, []string{"http://"}},
		{CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"download","parameters":{"url":"http:///x"}}`, []string{"no host"}},
		{CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"download","parameters":{"url":"http://u:p@h/x"}}`, []string{"password"}},
		{CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"download","parameters":{"url":"http://h/x"},"expectedChecksum":"abc"}`, []string{`"abc"`, "128"}},
		{CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"download","parameters":{"url":"http://h/x"},"expectedChecksum":"md5:abc"}`, []string{"sha256"}},
		{CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"download","parameters":{"url":5}}`, []string{"parameters", "a string"}},
		{CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"file","parameters":{"path":"../x"}}`, []string{"absolute"}},
		{CodeForbidden, "POST", "/v1/backingimages", `{"name":"a","sourceType":"file","parameters":{"path":"/etc/shadow"}}`, []string{"unix socket"}},
		{CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"download","parameters":{"url":"nbd:///x"}}`, []string{"no host"}},
		{CodeForbidden, "POST", "/v1/backingimages", `{"name":"a","sourceType":"download","parameters":{"url":"nbd+unix:///x?socket=/run/x"}}`, []string{"unix socket"}},
		{CodeForbidden, "POST", "/v1/backingimages", `{"name":"a","sourceType":"download","parameters":{"url":"nbds://h/x?tls-certificates=/etc/ashlar/tls"}}`, []string{"unix socket"}},
		{CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"download","parameters":{"url":"nbds://h/x?a=b&tls-certificates=/etc/ashlar/tls"}}`, []string{"tls-certificates=DIR"}},
		{CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"download","parameters":{"url":"nbd+unix:///x"}}`, []string{"the path is missing"}},
		{CodeNotBuilt, "POST", "/v1/backingimages", `{"name":"a","sourceType":"clone"}`, []string{"clone"}},
		{CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"export-from-volume"}`, []string{"volume-name is missing"}},
		{CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"export-from-volume","parameters":{"volume-name":"nothing"}}`, []string{`no volume "nothing"`}},
		{CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"export-from-volume","parameters":{"volume-name":"live","export-type":"vmdk"}}`, []string{`"vmdk"`}},
		{CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"export-from-volume","parameters":{"volume-name":"live","snapshot-name":"s9"}}`, []string{`no snapshot "s9"`}},
		{CodeConflict, "POST", "/v1/backingimages/debian?action=upload&size=512", ``, []string{"comes from download"}},
		{CodeNotFound, "POST", "/v1/backingimages/nothing?action=upload&size=512", ``, nil},
		{CodeInvalid, "POST", "/v1/volumes/db1?action=updateLimits", `{"iops":"many"}`, []string{`"many"`}},
		{CodeInvalid, "POST", "/v1/volumes/db1?action=updateLimits", `{"iops":100,"burstIOPS":50}`, []string{"less than iops"}},
		{CodeInvalid, "POST", "/v1/volumes/db1?action=updateLimits", `{"bytesPerSecond":"1"}`, []string{"4096"}},
		{CodeInvalid, "POST", "/v1/volumes/db1?action=updateLimits", `{"burstSeconds":7200}`, []string{"3600"}},
		{CodeNotFound, "POST", "/v1/volumes/nothing?action=updateLimits", `{}`, nil},
		{CodeForbidden, "POST", "/v1/volumes/db1?action=exportFile", `{"path":"/tmp/x.raw"}`, []string{"unix socket"}},
		{CodeInvalid, "POST", "/v1/volumes/db1?action=exportFile", `{"path":"x.raw"}`, []string{"absolute"}},
		{CodeNotAttached, "POST", "/v1/volumes/db1?action=snapshotDiff", `{}`, []string{"attach it first"}},
		{CodeNotFound, "POST", "/v1/volumes/bare?action=snapshotDiff", `{"from":"s9"}`, []string{"s9"}},
		{CodeInvalid, "POST", "/v1/volumes/bare?action=snapshotDiff", `{"from":"volume-head"}`, []string{"older"}},
		{CodeInvalid, "POST", "/v1/volumes/bare?action=snapshotDiff", `{"off":-1}`, []string{"off is -1"}},
		{CodeNotFound, "GET", "/v1/operations/db1/ff", ``, []string{"no operation"}},
		{CodeNotFound, "GET", "/v1/tokens/t", ``, nil},
		{CodeNotFound, "DELETE", "/v1/tokens/t", ``, nil},
		{CodeInvalid, "POST", "/v1/tokens", `{}`, []string{"name is missing"}},
		{CodeInvalid, "POST", "/v1/tokens", `{"name":"t","expires":"1999-01-01T00:00:00Z"}`, []string{"to come"}},
		{CodeInvalid, "POST", "/v1/tokens", `{"name":"t","expires":"soon"}`, []string{`"soon"`}},
		{CodeUnauthorized, "GET", "/v1/volumes?token=abc", ``, []string{"token in the wrong place", "URL"}},
		{CodeInvalid, "POST", "/v1/backingimages", `{"name":"a","sourceType":"thin air"}`, []string{`"thin air"`}},
		{CodeExists, "POST", "/v1/backingimages", `{"name":"debian","sourceType":"download","parameters":{"url":"http://h/x"}}`, []string{"exists already"}},
		{CodeInUse, "DELETE", "/v1/backingimages/debian", ``, []string{"in use by volume db1"}},
		{CodeInUse, "POST", "/v1/backingimages/debian?action=backingImageCleanup", `{"disks":["DISK"]}`, []string{"in use by volume db1"}},
		{CodeInvalid, "POST", "/v1/backingimages/debian?action=updateMinNumberOfCopies", `{"minNumberOfCopies":0}`, []string{"1 to 20"}},
		{CodeNotFound, "GET", "/v1/backingimages/nothing/download", ``, []string{"no such image"}},
		{CodeInvalid, "GET", "/v1/backingimages/debian/download?format=vmdk", ``, []string{`"vmdk"`}},
		{CodeConflict, "GET", "/v1/backingimages/slow/download", ``, []string{"not ready"}},
		{CodeNotFound, "GET", "/v1/volumes/nothing/download", ``, nil},
		{CodeNotFound, "GET", "/v1/volumes/live/download?snapshot=s9", ``, []string{"s9"}},
		{CodeInvalid, "GET", "/v1/volumes/live/download?format=vmdk", ``, nil},
		{CodeNotFound, "GET", "/v1/backingimages/debian/other", ``, nil},
		{CodeNotFound, "GET", "/v1/volumes/db1/a/b/c", ``, nil},
		{CodeNotFound, "GET", "//v1/volumes", ``, nil},
		{CodeNotFound, "GET", "/v1/../etc/passwd", ``, nil},
		{CodeMethod, "DELETE", "/v1/volumes", ``, []string{"GET, POST"}},
		{CodeMethod, "HEAD", "/v1/volumes", ``, nil},
		{CodeMethod, "POST", "/healthz", ``, []string{"GET"}},
		{CodeMethod, "POST", "/metrics", ``, []string{"GET"}},
		{CodeInvalid, "GET", "/v1/events?follow=true&after=x", ``, []string{"revision"}},
		{CodeNotFound, "GET", "/v1/ws/1s", ``, []string{"there are:", "volumes"}},
		{CodeNotFound, "GET", "/v1/ws/1s/about", ``, []string{"about"}},
		{CodeInvalid, "GET", "/v1/ws/volumes", ``, []string{"/v1/volumes"}},
		{CodeInvalid, "GET", "/v1/ws/soon/volumes", ``, []string{`"soon"`}},
		{CodeInUse, "POST", "/v1/nodes/n1?action=shutdown", `{}`, []string{"volumes bare, live"}},
		{CodeNotFound, "POST", "/v1/nodes/n2?action=shutdown", `{}`, []string{"no such node"}},
		{CodeInvalid, "POST", "/v1/nodes/n1?action=change", `{"placementZone":"-a"}`, []string{"zone", "begins or ends"}},
		{CodeInvalid, "POST", "/v1/nodes/n1?action=change", `{"placementZone":"` + big + `"}`, []string{"64 bytes", "63"}},
		{CodeInvalid, "POST", "/v1/nodes/n1?action=change", `{"placementZone":["a"]}`, []string{`"placementZone"`, "a string"}},
		{CodeInvalid, "PUT", "/v1/nodes/n1", `{"allowScheduling":true,"placementZone":"a b"}`, []string{"zone", "' '"}},
		{CodeInvalid, "POST", "/v1/nodes/n1?action=change", `{"tags":["a b"]}`, []string{"no spaces"}},
		{CodeInvalid, "POST", "/v1/nodes/n1?action=change", `{"evictionRequested":true}`, []string{"cannot be emptied"}},
		{CodeNotFound, "POST", "/v1/nodes/n2?action=change", `{}`, nil},
		{CodeNotFound, "POST", "/v1/nodes/n1?action=diskChange", `{"disk":"d2"}`, []string{"with a path it is added"}},
		{CodeInvalid, "POST", "/v1/nodes/n1?action=diskChange", `{"disk":"d2","path":"x"}`, []string{"absolute"}},
		{CodeInvalid, "POST", "/v1/nodes/n1?action=diskChange", `{"disk":"d2","path":"/var/lib/ashlar/disk1"}`, []string{"same path"}},
		{CodeExists, "POST", "/v1/nodes/n1?action=diskChange", `{"disk":"disk1","path":"/x"}`, []string{"already"}},
		{CodeInvalid, "POST", "/v1/nodes/n1?action=diskChange", `{"disk":"D2","path":"/x"}`, []string{"lower-case"}},
		{CodeInvalid, "POST", "/v1/nodes/n1?action=diskChange", `{"path":"/x"}`, []string{"name is missing"}},
		{CodeInvalid, "POST", "/v1/nodes/n1?action=diskChange", `{"disk":"disk1","storageReserved":-1}`, []string{"negative"}},
		{CodeInvalid, "POST", "/v1/nodes/n1?action=diskChange", `{"disk":"disk1","evictionRequested":true}`, []string{"cannot be emptied"}},
		{CodeNotFound, "POST", "/v1/nodes/n1?action=diskRemove", `{"disk":"d2"}`, []string{`"d2"`}},
		{CodeConflict, "POST", "/v1/nodes/n1?action=diskRemove", `{"disk":"disk1"}`, []string{"still takes new copies"}},
		{CodeNotFound, "DELETE", "/v1/nodes/n2", ``, []string{"no such node"}},
		{CodeConflict, "DELETE", "/v1/nodes/n1", ``, []string{"the last of the cluster"}},
		{CodeInvalid, "DELETE", "/v1/nodes/n1?force=perhaps", ``, []string{`"perhaps"`}},
		{CodeInvalid, "POST", "/v1/nodes/n1?action=diskUpdate", `{}`, []string{"disks is missing"}},
		{CodeInvalid, "POST", "/v1/nodes/n1?action=diskUpdate", `{"disks":{"a":{"path":"relative"}}}`, []string{"absolute"}},
		{CodeInvalid, "POST", "/v1/nodes/n1?action=diskUpdate", `{"disks":{"a":{"path":"/x"},"b":{"path":"/x"}}}`, []string{"same path"}},
		{CodeInvalid, "POST", "/v1/nodes/n1?action=diskUpdate", `{"disks":{"disk1":{"path":"/x"}}}`, []string{"cannot be changed"}},
		{CodeConflict, "POST", "/v1/nodes/n1?action=diskUpdate", `{"disks":{}}`, []string{"allowScheduling"}},
		{CodeNotSupported, "PUT", "/v1/settings/v2-data-engine", `{"value":"true"}`, []string{"not supported"}},
		{CodeInvalid, "PUT", "/v1/settings/default-replica-count", `{"value":"many"}`, []string{"1 to 20"}},
		{CodeInvalid, "PUT", "/v1/settings/default-replica-count", `{}`, []string{"value is missing"}},
		{CodeInvalid, "PUT", "/v1/settings/default-replica-count", `{"value":3}`, []string{`"value"`, "a string"}},
	}
	inBubble(t, func(x *fixture) {
		x.want(200, "POST", "/v1/backingimages", `{"name":"debian","sourceType":"download","parameters":{"url":"http://h/debian"}}`)
		x.want(200, "POST", "/v1/backingimages", `{"name":"slow","sourceType":"download","parameters":{"url":"http://h/slow"}}`)
		x.want(200, "POST", "/v1/backingimages", `{"name":"huge","sourceType":"download","parameters":{"url":"http://h/huge"}}`)
		x.want(200, "POST", "/v1/volumes", `{"name":"db1","size":"1Gi","backingImage":"debian"}`)
		x.attached("live")
		x.want(200, "POST", "/v1/volumes/live?action=snapshotCreate", `{"name":"s1"}`)
		x.want(200, "POST", "/v1/volumes", `{"name":"bare","size":"1Gi"}`)
		x.want(200, "POST", "/v1/volumes/bare?action=attach", `{"hostId":"n1","disableFrontend":true}`)
		x.want(200, "POST", "/v1/volumes/bare?action=snapshotCreate", `{"name":"gone"}`)
		x.want(200, "POST", "/v1/volumes/bare?action=snapshotCreate", `{"name":"s1"}`)
		x.want(200, "POST", "/v1/volumes/bare?action=snapshotDelete", `{"name":"gone"}`)
		before := x.everything()
		for _, c := range cases {
			x.refused(c.code, c.method, c.path, strings.ReplaceAll(c.body, "DISK", x.standIn.DiskID()), c.words...)
			if after := x.everything(); after != before {
				t.Fatalf("%s %s %.200s was refused and changed the catalogue:\n%s", c.method, c.path, c.body, firstDifference(before, after))
			}
		}
	})
}

// TestRemovedSnapshotIsNoTarget wants the API itself to refuse the revert, before an operation is made.
func TestRemovedSnapshotIsNoTarget(t *testing.T) {
	inBubble(t, func(x *fixture) {
		x.want(200, "POST", "/v1/volumes", `{"name":"db1","size":"1Gi"}`)
		x.want(200, "POST", "/v1/volumes/db1?action=attach", `{"hostId":"n1","disableFrontend":true}`)
		x.want(200, "POST", "/v1/volumes/db1?action=snapshotCreate", `{"name":"s1"}`)
		x.want(200, "POST", "/v1/volumes/db1?action=snapshotDelete", `{"name":"s1"}`)
		x.refused(CodeConflict, "POST", "/v1/volumes/db1?action=snapshotRevert", `{"name":"s1"}`, "marked removed")
	})
}

// TestImageInUse wants an image to stay while any volume stands on it, and to go afterwards.
func TestImageInUse(t *testing.T) {
	inBubble(t, func(x *fixture) {
		x.want(200, "POST", "/v1/backingimages", `{"name":"debian","sourceType":"download","parameters":{"url":"http://h/debian"}}`)
		x.want(200, "POST", "/v1/volumes", `{"name":"db1","size":"1Gi","backingImage":"debian"}`)
		x.want(200, "POST", "/v1/volumes", `{"name":"db2","size":"1Gi","backingImage":"debian"}`)
		x.refused(CodeInUse, "DELETE", "/v1/backingimages/debian", "", "volumes db1, db2")
		x.want(200, "DELETE", "/v1/volumes/db1", "")
		x.want(200, "DELETE", "/v1/volumes/db2", "")
		x.want(200, "DELETE", "/v1/backingimages/debian", "")
		x.refused(CodeNotFound, "GET", "/v1/backingimages/debian", "")
	})
}

// TestImageDeletedMeanwhile lets the deletion of the image come between the check of a new volume and its record: the volume is taken back.
func TestImageDeletedMeanwhile(t *testing.T) {
	inBubble(t, func(x *fixture) {
		x.want(200, "POST", "/v1/backingimages", `{"name":"debian","sourceType":"download","parameters":{"url":"http://h/debian"}}`)
		img, _, err := catalog.Read[catalog.ImageWanted](t.Context(), x.mem, catalog.ImageKey(catalog.Wanted, "debian"))
		if err != nil {
			t.Fatal(err)
		}
		// Without letting anything settle: the record is a tombstone, and still there.
		if a := x.send("DELETE", "/v1/backingimages/debian", ""); a.status != 200 {
			t.Fatalf("delete: %s", a.raw)
		}
		w := catalog.VolumeWanted{Name: "late", ID: strings.Repeat("ab", 16), SizeBytes: MinSize, Image: "debian", ImageID: img.ID, Copies: 1}
		if err := x.h.putVolume(t.Context(), w); CodeOf(err) != CodeConflict {
			t.Errorf("putVolume: %v", err)
		}
		x.settle()
		x.refused(CodeNotFound, "GET", "/v1/volumes/late", "")
	})
}

// TestSizes rounds up to 2 MiB and to 10 MiB at least, and takes quantities.
func TestSizes(t *testing.T) {
	inBubble(t, func(x *fixture) {
		for size, want := range map[string]string{
			"1": "10485760", "33554432": "33554432", "32Mi": "33554432", "33554433": "35651584", "10Gi": "10737418240", "1G": "1000341504", "1.5Gi": "1610612736",
			"1e9": "1000341504", "1E9": "1000341504", "0.0000001Ki": "10485760", "15Ti": "16492674416640", "100M": "100663296", "11000k": "12582912",
		} {
			a := x.want(200, "POST", "/v1/volumes", `{"name":"v","size":"`+size+`"}`)
			if a.str("size") != want {
				t.Errorf("size %s became %s, want %s", size, a.str("size"), want)
			}
			x.want(200, "DELETE", "/v1/volumes/v", "")
		}
	})
	for _, bad := range []string{"", " 1", "1 ", "+1", "1Gb", "1gi", "0x10", "1_000", "1/2", "1e", "1e-1", "1e999", "e5", ".", "1..5", "Gi", "NaN", "Inf", "0.0", "16Ti", "15.1Ti",
		strings.Repeat("9", 41), strings.Repeat("9", 40), "1Ei", "5K", "-0", "١"} {
		if n, err := ParseSize(bad); CodeOf(err) != CodeInvalid {
			t.Errorf("ParseSize(%q) is %d, %v", bad, n, err)
		}
	}
	for n, want := range map[int64]string{
		0: "0 bytes", 1023: "1023 bytes", 1 << 10: "1 KiB", 10 << 30: "10 GiB", 3 << 29: "1.5 GiB", 33554433: "32 MiB (33554433 bytes)",
		15 << 40: "15 TiB", 1000341504: "954 MiB", 1<<30 + 1: "1 GiB (1073741825 bytes)",
	} {
		if got := FormatSize(n); got != want {
			t.Errorf("FormatSize(%d) is %q, want %q", n, got, want)
		}
	}
}

// TestImageGivesSize makes a volume as large as its image when no size is asked for.
func TestImageGivesSize(t *testing.T) {
	inBubble(t, func(x *fixture) {
		x.want(200, "POST", "/v1/backingimages", `{"name":"debian","sourceType":"download","parameters":{"url":"http://h/debian"}}`)
		if a := x.want(200, "POST", "/v1/volumes", `{"name":"a","backingImage":"debian"}`); a.str("size") != "67108864" {
			t.Errorf("size %s", a.str("size"))
		}
		// While the image has no size yet, any size may be asked for.
		x.want(200, "POST", "/v1/backingimages", `{"name":"slow","sourceType":"download","parameters":{"url":"http://h/slow"}}`)
		x.want(200, "POST", "/v1/volumes", `{"name":"b","size":"1Gi","backingImage":"slow"}`)
	})
}

// TestLifecycle follows the states that a client sees.
func TestLifecycle(t *testing.T) {
	inBubble(t, func(x *fixture) {
		if a := x.send("POST", "/v1/volumes", `{"name":"db1","size":"1Gi"}`); a.str("state") != "creating" {
			t.Errorf("just created it is %s", a.str("state"))
		}
		x.settle()
		v := x.volume("db1")
		if v.State != "detached" || v.NumberOfReplicas != 3 || len(v.Replicas) != 3 || v.Conditions["Scheduled"].Status != "False" || len(v.Controllers) != 1 || v.Frontend != "nbd" {
			t.Errorf("created: %+v", v)
		}
		if a := x.send("POST", "/v1/volumes/db1?action=attach", `{"hostId":"n1"}`); a.str("state") != "attaching" {
			t.Errorf("just attached it is %s", a.str("state"))
		}
		x.settle()
		x.want(200, "POST", "/v1/volumes/db1?action=attach", `{"hostId":"n1"}`) // idempotent
		if v = x.volume("db1"); v.State != "attached" || v.Robustness != "degraded" || v.Controllers[0].Endpoint != "nbd+unix:///db1?socket=/run/ashlar/nbd/db1.sock" {
			t.Errorf("attached: %+v", v)
		}
		if a := x.send("POST", "/v1/volumes/db1?action=detach", `{}`); a.str("state") != "detaching" {
			t.Errorf("just detached it is %s", a.str("state"))
		}
		x.settle()
		x.want(200, "POST", "/v1/volumes/db1?action=detach", ``) // idempotent, and without a body
		if v = x.volume("db1"); v.State != "detached" || v.Controllers[0].Endpoint != "" || v.Robustness != "unknown" {
			t.Errorf("detached: %+v", v)
		}
		x.want(200, "POST", "/v1/volumes/db1?action=attach", `{"hostId":"n1"}`)
		if a := x.send("DELETE", "/v1/volumes/db1", ""); a.status != 200 || len(a.raw) != 0 {
			t.Errorf("delete: %d %s", a.status, a.raw)
		}
		if a := x.send("GET", "/v1/volumes/db1", ""); a.str("state") != "deleting" {
			t.Errorf("just deleted it is %s", a.str("state"))
		}
		x.refused(CodeExists, "POST", "/v1/volumes", `{"name":"db1","size":"1Gi"}`, "being deleted")
		x.settle()
		x.refused(CodeNotFound, "GET", "/v1/volumes/db1", "")
	})
}

// TestTickets lets several holders attach a volume, each with an id of its own; it stays attached until the last is gone.
func TestTickets(t *testing.T) {
	inBubble(t, func(x *fixture) {
		x.attached("db1")
		x.want(200, "POST", "/v1/volumes/db1?action=attach", `{"hostId":"n1","attachmentID":"csi-1"}`)
		x.want(200, "POST", "/v1/volumes/db1?action=detach", `{"hostId":"elsewhere"}`) // not its ticket
		x.want(200, "POST", "/v1/volumes/db1?action=detach", `{"hostId":"n1"}`)
		if v := x.volume("db1"); v.State != "attached" {
			t.Errorf("with one ticket left: %s", v.State)
		}
		x.want(200, "POST", "/v1/volumes/db1?action=detach", `{"forceDetach":true}`)
		if v := x.volume("db1"); v.State != "detached" {
			t.Errorf("with none left: %s", v.State)
		}
		// A second node: attached here, refused there.
		other := catalog.NodeWanted{Name: "n2", AllowScheduling: true}
		seen := catalog.NodeObserved{Name: "n2", Ready: true}
		if _, err := catalog.Write(t.Context(), x.mem, catalog.NodeKey(catalog.Wanted, "n2"), other, 0); err != nil {
			t.Fatal(err)
		}
		x.refused(CodeUnreachable, "POST", "/v1/volumes/db1?action=attach", `{"hostId":"n2"}`, "n2 is not ready")
		if _, err := catalog.Write(t.Context(), x.mem, catalog.NodeKey(catalog.Observed, "n2"), seen, 0); err != nil {
			t.Fatal(err)
		}
		x.want(200, "POST", "/v1/volumes/db1?action=attach", `{"hostId":"n1"}`)
		x.refused(CodeConflict, "POST", "/v1/volumes/db1?action=attach", `{"hostId":"n2"}`, "attached to node n1", "detach")
	})
}

// TestFaulted shows what is left to do with a volume whose copies are gone: salvage, which attaches it again by itself because the ticket is still there.
func TestFaulted(t *testing.T) {
	inBubble(t, func(x *fixture) {
		x.attached("db1")
		_, _, err := catalog.Update(t.Context(), x.mem, catalog.VolumeKey(catalog.Observed, "db1"), func(o *catalog.VolumeObserved) error {
			o.Robustness = catalog.RobustnessFaulted
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
		x.settle()
		v := x.volume("db1")
		if _, ok := v.Actions["salvage"]; !ok || v.Actions["expand"] != "" || v.State != "detached" || v.Robustness != "faulted" || v.Ready {
			t.Errorf("faulted: %+v", v)
		}
		x.refused(CodeSalvage, "POST", "/v1/volumes/db1?action=expand", `{"size":"2Gi"}`, "salvage")
		x.refused(CodeInvalid, "POST", "/v1/volumes/db1?action=salvage", `{"names":["other"]}`, v.Replicas[0].Name)
		x.want(200, "POST", "/v1/volumes/db1?action=salvage", `{"names":["`+v.Replicas[0].Name+`"]}`)
		if v = x.volume("db1"); v.State != "attached" {
			t.Errorf("salvaged: %+v", v)
		}
	})
}

// TestExpand grows volumes, attached or not, and makes the system snapshot visible.
func TestExpand(t *testing.T) {
	inBubble(t, func(x *fixture) {
		x.want(200, "POST", "/v1/volumes", `{"name":"db1","size":"32Mi"}`)
		x.want(200, "POST", "/v1/volumes/db1?action=expand", `{"size":"32Mi"}`) // as it is: nothing to do
		if a := x.want(200, "POST", "/v1/volumes/db1?action=expand", `{"size":"67108863"}`); a.str("size") != "67108864" {
			t.Errorf("size %s", a.str("size"))
		}
		v := x.volume("db1")
		if v.State != "detached" || v.Controllers[0].Size != "67108864" || v.Size != "67108864" {
			t.Errorf("expanded: %+v", v)
		}
		x.want(200, "POST", "/v1/volumes/db1?action=attach", `{"hostId":"n1"}`)
		s := x.want(200, "POST", "/v1/volumes/db1?action=snapshotGet", `{"name":"expand-67108864"}`)
		if s.obj["usercreated"] != false {
			t.Errorf("the system's snapshot: %s", s.raw)
		}
		// A failed expansion is not wanted for ever.
		x.refused(CodeNoSpace, "POST", "/v1/volumes/db1?action=expand", `{"size":"1Ti"}`, "no space left")
		if v = x.volume("db1"); v.Size != "67108864" {
			t.Errorf("after a failed expansion: %+v", v)
		}
	})
}

// TestOperationTimeout answers 504 when an operation takes too long, and leaves it going on.
func TestOperationTimeout(t *testing.T) {
	inBubble(t, func(x *fixture) {
		x.attached("db1")
		x.standIn.Halt = []string{catalog.VerbSnapshot}
		before := time.Now()
		x.refused(CodeTimeout, "POST", "/v1/volumes/db1?action=snapshotCreate", `{"name":"s1"}`, "still pending", "goes on")
		if d := time.Since(before); d != time.Minute+time.Second {
			t.Errorf("waited %v, with the second of settling", d)
		}
		ops, _, err := catalog.All[catalog.Operation](t.Context(), x.mem, catalog.KindOperation, catalog.Wanted)
		if err != nil || len(ops) != 1 || ops[0].Value.State != catalog.OperationPending || len(ops[0].Value.ID) != 32 {
			t.Errorf("operations: %+v, %v", ops, err)
		}
	})
}

// compacting is a catalogue that throws history away just before the first watches begin.
type compacting struct {
	*catalog.Mem
	left atomic.Int32
}

func (c *compacting) Watch(ctx context.Context, from catalog.Rev, fn func(catalog.Event) error) error {
	if c.left.Add(-1) >= 0 {
		return fmt.Errorf("watch: %w", catalog.ErrCompacted)
	}
	return c.Mem.Watch(ctx, from, fn)
}

// TestOperationCompacted keeps waiting when the history it wants to watch is thrown away.
func TestOperationCompacted(t *testing.T) {
	inBubble(t, func(x *fixture) {
		x.attached("db1")
		cat := &compacting{Mem: x.mem}
		cat.left.Store(2)
		x.h.cfg.Catalog = cat
		x.want(200, "POST", "/v1/volumes/db1?action=snapshotCreate", `{"name":"s1"}`)
	})
}

// TestPurge shows the last purge's result for each replica, and asks for no second one while one is waiting.
func TestPurge(t *testing.T) {
	inBubble(t, func(x *fixture) {
		x.attached("db1")
		x.standIn.Halt = []string{catalog.VerbPurge}
		for range 2 {
			x.want(200, "POST", "/v1/volumes/db1?action=snapshotPurge", `{}`)
		}
		v := x.volume("db1")
		if want := []PurgeStatus{{Replica: v.Replicas[0].Name, State: "in_progress", IsPurging: true}}; !slices.Equal(v.PurgeStatus, want) {
			t.Errorf("purgeStatus %+v", v.PurgeStatus)
		}
		ops, _, err := catalog.All[catalog.Operation](t.Context(), x.mem, catalog.KindOperation, catalog.Wanted)
		if err != nil || len(ops) != 1 {
			t.Fatalf("%d purges, %v", len(ops), err)
		}
		for _, c := range []struct {
			state, message string
			want           PurgeStatus
		}{
			{catalog.OperationDone, "", PurgeStatus{State: "complete", Progress: 100}},
			{catalog.OperationFailed, "no space", PurgeStatus{State: "error", Error: "no space"}},
		} {
			_, _, err := catalog.Update(t.Context(), x.mem, ops[0].Key, func(op *catalog.Operation) error {
				op.State, op.Message, op.Code = c.state, c.message, catalog.CodeNoSpace
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
			c.want.Replica = v.Replicas[0].Name
			if got := x.volume("db1").PurgeStatus; !slices.Equal(got, []PurgeStatus{c.want}) {
				t.Errorf("%s: %+v", c.state, got)
			}
		}
	})
}

// TestCheck reports problems, and none, with success.
func TestCheck(t *testing.T) {
	inBubble(t, func(x *fixture) {
		x.attached("db1")
		if a := x.want(200, "POST", "/v1/volumes/db1?action=check", ""); len(a.obj["problems"].([]any)) != 0 {
			t.Errorf("clean: %s", a.raw)
		}
		x.standIn.Problems = []catalog.Problem{{Object: "layer 00ff", What: "checksum of unit 7 does not match"}}
		if a := x.want(200, "POST", "/v1/volumes/db1?action=check", ""); len(a.obj["problems"].([]any)) != 1 {
			t.Errorf("broken: %s", a.raw)
		}
	})
}

// TestSettingsAct wants what the dialect says of settings and nodes: only changed settings have a record; a volume takes the default number of copies.
func TestSettingsAct(t *testing.T) {
	for name, s := range settings() {
		if s.standard() == "" && s.kind != "string" {
			t.Errorf("setting %s has no default", name)
		}
	}
	inBubble(t, func(x *fixture) {
		x.want(200, "PUT", "/v1/settings/default-replica-count", `{"value":"2"}`)
		if a := x.want(200, "POST", "/v1/volumes", `{"name":"a","size":"1Gi"}`); a.obj["numberOfReplicas"] != 2.0 {
			t.Errorf("copies: %s", a.raw)
		}
		x.want(200, "PUT", "/v1/settings/default-replica-count", `{"value":"{\"v1\":\"1\"}"}`)
		if a := x.want(200, "GET", "/v1/settings/default-replica-count", ""); a.str("value") != `{"v1":"1","v2":"3"}` {
			t.Errorf("value: %s", a.raw)
		}
		if a := x.want(200, "PUT", "/v1/settings/default-replica-count", `{"value":"3"}`); a.str("value") != `{"v1":"3","v2":"3"}` {
			t.Errorf("value: %s", a.raw)
		}
		if l, _, err := x.mem.List(t.Context(), catalog.KindSetting); err != nil || len(l) != 0 {
			t.Errorf("records of settings at their default: %v, %v", l, err)
		}
	})
}

// TestCatalogueAway answers 503, says that it is not ready, and is alive.
func TestCatalogueAway(t *testing.T) {
	inBubble(t, func(x *fixture) {
		x.want(200, "GET", "/readyz", "")
		x.mem.Away(true)
		x.refused(CodeUnreachable, "GET", "/v1/volumes", "", "did not answer")
		x.refused(CodeUnreachable, "POST", "/v1/volumes", `{"name":"a","size":"1Gi"}`)
		x.want(503, "GET", "/readyz", "")
		x.want(200, "GET", "/healthz", "")
		x.refused(CodeUnreachable, "GET", "/metrics", "")
		x.mem.Away(false)
	})
}

// TestBadRecord wants one unreadable record to hide nothing but itself.
func TestBadRecord(t *testing.T) {
	inBubble(t, func(x *fixture) {
		x.want(200, "POST", "/v1/volumes", `{"name":"good","size":"1Gi"}`)
		if _, err := x.mem.Put(t.Context(), catalog.SettingKey("odd"), []byte(`[]`), 0); err != nil {
			t.Fatal(err)
		}
		if a := x.want(200, "GET", "/v1/settings", ""); len(a.obj["data"].([]any)) != len(settings()) {
			t.Errorf("settings: %s", a.raw)
		}
	})
}

// TestShutdown asks the node only when nothing is attached, or by force.
func TestShutdown(t *testing.T) {
	inBubble(t, func(x *fixture) {
		stops := &x.h.cfg.Extra.(*extra).shutdowns
		x.attached("db1")
		x.refused(CodeInUse, "POST", "/v1/nodes/n1?action=shutdown", "", "volume db1")
		if stops.Load() != 0 {
			t.Error("it stopped all the same")
		}
		x.want(200, "POST", "/v1/nodes/n1?action=shutdown", `{"force":true}`)
		if stops.Load() != 1 {
			t.Error("it did not stop")
		}
	})
}

// TestLinks builds them from what the client, or the proxy before it, calls this server.
func TestLinks(t *testing.T) {
	for _, c := range []struct {
		header map[string]string
		want   string
	}{
		{nil, "http://node1:9500/v1"},
		{map[string]string{"X-Forwarded-Host": "store.example", "X-Forwarded-Proto": "https"}, "https://store.example/v1"},
		{map[string]string{"X-Forwarded-Host": "store.example, inner", "X-Forwarded-Port": "8443", "X-Forwarded-Proto": "https"}, "https://store.example:8443/v1"},
		{map[string]string{"X-Forwarded-Host": "evil\"><script>", "X-Forwarded-Proto": "javascript"}, "http://node1:9500/v1"},
		{map[string]string{"X-Forwarded-Host": "h", "X-Forwarded-Port": "1/x"}, "http://h/v1"},
	} {
		r, err := http.NewRequest("GET", "http://node1:9500/v1", nil)
		if err != nil {
			t.Fatal(err)
		}
		for k, v := range c.header {
			r.Header.Set(k, v)
		}
		if got := baseURL(r) + "/v1"; got != c.want {
			t.Errorf("%v: %s, want %s", c.header, got, c.want)
		}
	}
}

// TestOtherSites refuses what a browser says comes from another site's page, and serves what says nothing.
func TestOtherSites(t *testing.T) {
	inBubble(t, func(x *fixture) {
		for site, want := range map[string]int{"cross-site": 403, "same-origin": 200, "": 200} {
			r, err := http.NewRequest("POST", "http://127.0.0.1:9500/v1/volumes", strings.NewReader(`{"name":"x`+site+`","size":"1Gi"}`))
			if err != nil {
				t.Fatal(err)
			}
			if site != "" {
				r.Header.Set("Sec-Fetch-Site", site)
			}
			w := newRecorder()
			x.h.ServeHTTP(w, onLoopback(r))
			if w.Code != want || !json.Valid(w.Body.Bytes()) {
				t.Errorf("%q: %d %s", site, w.Code, w.Body)
			}
		}
	})
}

// TestCheckListen lets only loopback through, unless it is TLS.
func TestCheckListen(t *testing.T) {
	for addr, ok := range map[string]bool{
		"127.0.0.1:9500": true, "127.9.9.9:1": true, "localhost:9500": true, "[::1]:9500": true, "[::ffff:127.0.0.1]:1": true,
		"0.0.0.0:9500": false, ":9500": false, "192.0.2.1:9500": false, "[::]:9500": false, "example.org:9500": false, "127.0.0.1": false, "": false, "127.0.0.1.example.org:1": false,
	} {
		if err := CheckListen(addr, Plain); (err == nil) != ok {
			t.Errorf("CheckListen(%q) is %v", addr, err)
		}
		if err := CheckListen(addr, OverTLS); errors.Is(err, ErrListen) {
			t.Errorf("CheckListen(%q) over TLS is %v", addr, err)
		}
	}
	for _, addr := range []string{"", "127.0.0.1", "host:port-that-is-none"} {
		if CheckListen(addr, OverTLS) == nil {
			t.Errorf("CheckListen(%q) over TLS is fine", addr)
		}
	}
}

// TestDefaultFrontend gives a volume whose creator names no frontend what the node says it can have.
func TestDefaultFrontend(t *testing.T) {
	for given, want := range map[string]string{"": "nbd", "nbd": "nbd", "blockdev": "blockdev"} {
		mem := catalog.NewMem()
		h := New(Config{Catalog: mem, Node: "n1", Version: "v1", Frontend: given})
		doc, err := theDocument()
		if err != nil {
			t.Fatal(err)
		}
		x := &fixture{t: t, h: h, mem: mem, schema: doc}
		for body, want := range map[string]string{`{"name":"a","size":"1Gi","frontend":""}`: want, `{"name":"b","size":"1Gi","frontend":"nbd"}`: "nbd", `{"name":"c","size":"1Gi","frontend":"blockdev"}`: "blockdev"} {
			if a := x.send("POST", "/v1/volumes", body); a.str("frontend") != want {
				t.Errorf("default %q: %s became %q: %s", given, body, a.str("frontend"), a.raw)
			}
		}
		mem.Close()
	}
}

// manyRanges answers every diff with more ranges than fit in one answer.
type manyRanges struct{ Extra }

func (manyRanges) Diff(_ context.Context, r DiffRange, each func(off, n int64, zero bool)) (int64, int64, error) {
	const end = 2 * 8192 * (maxDiffRanges + 10)
	for off := (r.Off + 8191) / 8192 * 8192; off < end; off += 8192 {
		each(off, 4096, false)
	}
	return 1 << 30, 1 << 30, nil
}

// TestDiffGoesOn asks for a difference of more ranges than one answer has: together the answers have all of them, once.
func TestDiffGoesOn(t *testing.T) {
	inBubble(t, func(x *fixture) {
		x.h.cfg.Extra = manyRanges{}
		x.attached("db1")
		next, seen := int64(0), 0
		for next < 1<<30 {
			a := x.want(200, "POST", "/v1/volumes/db1?action=snapshotDiff", fmt.Sprintf(`{"off":%d}`, next))
			var d SnapshotDiff
			if err := json.Unmarshal(a.raw, &d); err != nil || len(d.Ranges) > maxDiffRanges || d.NextOff <= next {
				t.Fatalf("%d ranges, next %d after %d: %v", len(d.Ranges), d.NextOff, next, err)
			}
			for _, r := range d.Ranges {
				if r.Off != int64(seen)*8192 {
					t.Fatalf("range %d begins at %d", seen, r.Off)
				}
				seen++
			}
			next = d.NextOff
		}
		if seen != 2*(maxDiffRanges+10) {
			t.Errorf("%d ranges", seen)
		}
	})
}

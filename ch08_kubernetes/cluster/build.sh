#!/usr/bin/env bash
# The recipe of the local control plane: etcd, kube-apiserver, kube-controller-manager, kube-scheduler and kubectl,
# v1.20.2, from Debian 12's packages. Called by build.py in an empty folder, whose bin/ it fills: about 5 minutes on
# 2 cores, 2 GB of disk meanwhile. Nothing is installed, and no root is needed: apt's state and cache are this folder.
set -euo pipefail
mirror=$1 # of Debian, as in this system's own sources
here=$PWD
say() { printf '%s\n' "$*"; }

say "fetch the sources"
mkdir -p apt/{parts,lists/partial,cache/archives/partial} debs gopath/src/k8s.io bin
cat >apt/parts/debian.sources <<END
Types: deb deb-src
URIs: $mirror
Suites: bookworm
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg
END
private() { # apt, with nothing of this system's but its network settings
    apt-get -qq -o Dir::Etc::SourceList=/dev/null -o Dir::Etc::SourceParts="$here/apt/parts" \
        -o Dir::Etc::Preferences=/dev/null -o Dir::Etc::PreferencesParts=/dev/null -o APT::Default-Release= \
        -o Dir::State="$here/apt" -o Dir::State::Lists="$here/apt/lists" -o Dir::State::Status=/dev/null \
        -o Dir::Cache="$here/apt/cache" -o APT::Sandbox::User="$(id -un)" -o Acquire::Retries=3 "$@"
}
private update
private source --download-only kubernetes
private download etcd-server kubernetes-client golang-1.19-go golang-1.19-src golang-github-modern-go-reflect2-dev
for package in *.deb; do dpkg-deb --extract "$package" debs; done
dpkg-source --no-check --extract kubernetes_*.dsc gopath/src/k8s.io/kubernetes >/dev/null

# Go's own settings of whoever builds must not reach this build.
unset GOFLAGS GOBIN GOTOOLDIR GOARCH GOOS
export GOENV=off GOROOT=$here/debs/usr/lib/go-1.19 GOPATH=$here/gopath GOCACHE=$here/gocache GO111MODULE=off CGO_ENABLED=0
export PATH=$GOROOT/bin:$PATH
cd gopath/src/k8s.io/kubernetes
# The reflect2 in the source (1.0.1) reads Go's map internals as they were before Go 1.18, and crashes; Debian's does not.
reflect2=vendor/github.com/modern-go/reflect2
rm -r $reflect2
cp -r "$here/debs/usr/share/gocode/src/github.com/modern-go/reflect2" $reflect2
find $reflect2 -name '*_test.go' -delete

say "generate the OpenAPI definitions"
# The release tarball lacks them. Their inputs: every package that asks for them by its tag, under its import path.
go build -o "$here/openapi-gen" ./vendor/k8s.io/kube-openapi/cmd/openapi-gen
inputs=$(grep -rl --include='*.go' --exclude='*_test.go' --exclude='zz_generated*' '^// +k8s:openapi-gen=' \
    staging/src/k8s.io/{api,apimachinery,apiserver,apiextensions-apiserver,kube-aggregator,metrics,component-base} \
    staging/src/k8s.io/{kube-controller-manager,kube-proxy,kube-scheduler,kubelet,cloud-provider} pkg cmd |
    xargs -n 1 dirname | sort -u | sed 's,^staging/src/,k8s.io/kubernetes/vendor/,; s,^\(pkg\|cmd\)/,k8s.io/kubernetes/&,' |
    paste -sd,)
"$here/openapi-gen" --logtostderr --input-dirs "$inputs" --output-package k8s.io/kubernetes/pkg/generated/openapi \
    --output-file-base zz_generated.openapi --output-base "$GOPATH/src" --report-filename "$here/violations" \
    --go-header-file vendor/k8s.io/code-generator/hack/boilerplate.go.txt

flags="-s -w"
for package in component-base/version client-go/pkg/version; do # as the vendored packages are called
    value="-X k8s.io/kubernetes/vendor/k8s.io/$package"
    flags+=" $value.gitVersion=v1.20.2 $value.gitMajor=1 $value.gitMinor=20"
done
for program in kube-apiserver kube-controller-manager kube-scheduler; do
    say "compile $program"
    go build -trimpath -ldflags "$flags" -o "$here/bin/$program" "./cmd/$program"
done
cp "$here"/debs/usr/bin/{etcd,kubectl} "$here/bin/"

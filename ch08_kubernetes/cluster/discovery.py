"""What an API server serves, asked of the server itself: versions of groups, kinds, and under which path they lie."""

from __future__ import annotations

import re
from dataclasses import dataclass

from kubernetes.client import ApiClient

from ch08_kubernetes.cluster.rest import Json, find, get
from common.script import UserError


@dataclass(frozen=True)
class Resource:
    """A kind as it is served: where its objects lie, and whether they are in namespaces."""

    version: str  # group/version
    kind: str
    plural: str
    namespaced: bool

    def path(self, name: str = "", namespace: str = "") -> str:
        root = f"/apis/{self.version}" if "/" in self.version else f"/api/{self.version}"
        within = f"/namespaces/{namespace}" if self.namespaced else ""
        return f"{root}{within}/{self.plural}" + (f"/{name}" if name else "")


class Server:
    """An API server's own account of itself; what it said is kept until `forget`."""

    def __init__(self, api: ApiClient) -> None:
        self.api = api
        said = get(api, "/version")
        self.version = str(said["gitVersion"])
        self.minor = int(re.sub(r"\D", "", str(said["minor"])) or 0)  # "27+" on managed clusters
        self._served: dict[str, dict[str, Resource]] = {}

    def forget(self) -> None:
        self._served.clear()

    def kinds(self, version: str) -> dict[str, Resource]:
        """The kinds of one group/version; none if it is not served."""
        if version not in self._served:
            listed = find(self.api, f"/apis/{version}" if "/" in version else f"/api/{version}")
            resources = (listed or {}).get("resources", [])
            self._served[version] = {
                r["kind"]: Resource(version, r["kind"], r["name"], r["namespaced"])
                for r in resources
                if "/" not in r["name"]  # a subresource
            }
        return self._served[version]

    def resource(self, version: str, kind: str) -> Resource | None:
        return self.kinds(version).get(kind)

    def versions(self, group: str) -> list[str]:
        """All served versions of a group, as group/version; the server's preferred one first."""
        found = find(self.api, f"/apis/{group}") if group else None
        return [v["groupVersion"] for v in (found or {}).get("versions", [])]


def of(body: Json) -> tuple[str, str, str]:
    """apiVersion, kind and name of an object.

    Raises:
        UserError: it lacks one of them.
    """
    version, kind = body.get("apiVersion"), body.get("kind")
    name = (body.get("metadata") or {}).get("name")
    if not (isinstance(version, str) and isinstance(kind, str) and isinstance(name, str)):
        raise UserError(f"an object has apiVersion {version!r}, kind {kind!r}, name {name!r}; each must be set")
    return version, kind, name


def group_of(version: str) -> str:
    return version.rpartition("/")[0]

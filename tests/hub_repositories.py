"""What a Hub of the tests holds: repositories with a history of commits, branches, tags and large files."""

import hashlib
from dataclasses import dataclass, field

USER = "tester"  # whose token it is
START = {".gitattributes": b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"}


class HubError(Exception):
    """An answer that is no success, with the headers that tell clients what it means."""

    def __init__(self, status: int, message: str, code: str = "", **headers: str):
        super().__init__(message)
        self.status, self.message = status, message
        self.headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers}


@dataclass(frozen=True)
class Commit:
    """A revision: all files of a repository by path."""

    id: str
    title: str
    files: dict[str, bytes]


@dataclass
class Repository:
    """A repository; `branches` and `tags` point to commits, `history` holds all of them, oldest first.

    Attributes:
        large: content of every large file that was uploaded, committed or not, by sha256.
    """

    id: str
    kind: str
    private: bool = False
    history: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)

    def commit(self, revision: str = "main") -> Commit:
        """The commit of a branch, a tag or an id."""
        wanted = self.branches.get(revision) or self.tags.get(revision) or revision
        for commit in self.history:
            if commit.id == wanted:
                return commit
        raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")

    def add(self, files: dict[str, bytes], title: str, branch: str = "main") -> Commit:
        """Append a commit of these files, all that there are, to a branch."""
        content = "".join(f"{name} {hashlib.sha256(files[name]).hexdigest()}\n" for name in sorted(files))
        told = f"{self.kind} {self.id} {len(self.history)} {title}\n{content}"
        self.history.append(Commit(hashlib.sha1(told.encode()).hexdigest(), title, files))
        self.branches[branch] = self.history[-1].id
        return self.history[-1]


def git_id(content: bytes) -> str:
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

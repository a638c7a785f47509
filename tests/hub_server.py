"""A Hub on the loopback: the calls that huggingface_hub makes, kept in memory, and its ways to fail."""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml

REPO = "([^/]+/[^/]+)"
CALLS = {  # kind: pattern of the path with two groups, repository and rest
    "whoami": "/api/whoami-v2()()",
    "card": "/api/validate-yaml()()",
    "create": "/api/repos/create()()",
    "preupload": f"/api/models/{REPO}/preupload/(.*)",
    "commit": f"/api/models/{REPO}/commit/(.*)",
    "tree": f"/api/models/{REPO}/tree/(.*)",
    "info": f"/api/models/{REPO}(?:/revision/(.*))?",
    "batch": rf"/{REPO}\.git/info/lfs/objects/batch()",
    "upload": "/lfs()/(.*)",
    "read": f"/{REPO}/resolve/(.*)",
}


LARGE = (".safetensors", ".bin")  # endings of files in Git LFS


def about_file(name, data):
    """A file in the answer to model_info(..., files_metadata=True)."""
    blob = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    lfs = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 134}
    about = {"rfilename": name, "size": len(data), "blobId": blob}
    return about | ({"lfs": lfs} if name.endswith(LARGE) else {})


def errors_of_card(content):
    """What the Hub finds wrong in the YAML at the head of a README, in its words."""
    head = re.match(r"---\n(.*?)\n---\n", content, re.S)
    try:
        metadata = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError as error:
        return [f"Invalid YAML: {error}"]
    errors = []
    for key, values in metadata.items():
        values = values if isinstance(values, list) else [values]
        if not all(isinstance(value, str) for value in values):
            errors.append(f'"{key}" must be a string or a list of strings')
        elif key in ("base_model", "datasets"):
            names = [value for value in values if not re.fullmatch(r"[\w.-]+/[\w.-]+", value)]
            errors += [f'"{key}" with value "{name}" is not valid' for name in names]
    return errors


class Hub:
    """`files[repo][path]` is what is stored; `calls` lists (method, kind); `refuse` maps kinds to refusals.

    Kinds: those of CALLS; a list of files is a "tree". Refusals: a status number, "429" with Retry-After once
    only, "cut" (the connection ends within the answer), "stall" (no answer for `stall` seconds). `before` is
    called with the kind before each answer. `tags[repo][name]` holds the files of a revision beside "main".
    Repositories may be of "tester" and of `organisations`, {name: the token's role there}; `access_token` is
    what whoami says of the token.
    """

    def __init__(self):
        self.files, self.objects, self.private = {}, {}, {}
        self.calls, self.tokens, self.refuse, self.stall = [], set(), {}, 5
        self.organisations, self.access_token = {}, {"displayName": "tests", "role": "write"}
        self.tags, self.before = {}, lambda kind: None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_):
                pass

            def answer(self, status, body=b"", **headers):
                body = body if isinstance(body, bytes) else json.dumps(body).encode()
                self.send_response(status)
                usual = {"Content-Length": len(body), "Content-Type": "application/json"}
                for key, value in (usual | headers).items():
                    self.send_header(key.replace("_", "-"), str(value))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

            def handle_any(self):
                length = int(self.headers.get("Content-Length") or 0)
                if self.headers.get("Transfer-Encoding") == "chunked":
                    body = b""
                    while size := int(self.rfile.readline(), 16):
                        body += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    body = self.rfile.read(length)
                path = unquote(self.path.split("?")[0])
                kind, repo, rest = hub.what(self.command, path)
                hub.calls.append((self.command, kind))
                hub.before(kind)
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
                refusal = hub.refuse.get(kind)
                if refusal == "429":
                    hub.refuse[kind] = None
                    return self.answer(429, {"error": "Too Many Requests"}, Retry_After=1)
                if refusal == "cut":
                    self.send_response(200)
                    self.send_header("Content-Length", "1000")
                    self.end_headers()
                    self.wfile.write(b"{")
                    self.close_connection = True
                    return None
                if refusal == "stall":
                    time.sleep(hub.stall)
                    self.close_connection = True
                    return None
                if refusal:
                    headers = {"X_Error_Code": "GatedRepo"} if refusal == 403 and kind == "read" else {}
                    return self.answer(refusal, {"error": f"refused with {refusal}"}, **headers)
                if kind != "upload" and token not in hub.tokens:
                    return self.answer(401, {"error": "Invalid credentials in Authorization header"})
                return getattr(self, "do_" + kind)(repo, rest, body)

            do_GET = do_POST = do_HEAD = do_PUT = handle_any

            def do_card(self, repo, rest, body):
                errors = [{"message": message} for message in errors_of_card(json.loads(body)["content"])]
                self.answer(400 if errors else 200, {"errors": errors, "warnings": []})

            def do_unknown(self, path, *_):
                self.answer(404, {"error": f"the tests' Hub does not know {self.command} {path}"})

            def do_whoami(self, *_):
                auth = {"type": "access_token", "accessToken": hub.access_token}
                orgs = [{"name": name, "roleInOrg": role} for name, role in hub.organisations.items()]
                self.answer(200, {"name": "tester", "type": "user", "auth": auth, "orgs": orgs})

            def do_create(self, repo, rest, body):
                asked = json.loads(body)
                owner = asked.get("organization") or "tester"
                token = hub.access_token
                limited = token.get("role") == "fineGrained" and "repo.write" not in json.dumps(token)
                member = owner == "tester" or hub.organisations.get(owner, "read") != "read"
                if limited or token.get("role") == "read" or not member:
                    return self.answer(403, {"error": f"You may not create repositories of {owner}"})
                repo = f"{owner}/{asked['name']}"
                if repo in hub.files:
                    error = "You already created this model repo"
                    return self.answer(409, {"error": error, "url": f"{hub.url}/{repo}"})
                hub.files[repo] = {}
                hub.private[repo] = asked.get("private", asked.get("visibility") == "private")
                self.answer(200, {"url": f"{hub.url}/{repo}", "name": repo})

            def do_info(self, repo, revision, *_):
                if repo not in hub.files:
                    return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                files = hub.version(repo, revision)
                if files is None:
                    return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
                info = {"id": repo, "modelId": repo, "private": True, "sha": hub.commit(files)}
                info["siblings"] = [{"rfilename": name} for name in files]
                if "blobs=" in self.path:
                    info["siblings"] = [about_file(name, data) for name, data in files.items()]
                self.answer(200, info | {"tags": [], "downloads": 0, "likes": 0})

            def do_tree(self, repo, *_):
                if repo not in hub.files:
                    return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                sizes = {name: len(data) for name, data in hub.files[repo].items()}
                usual = {"type": "file", "oid": "0" * 40}
                self.answer(200, [usual | {"path": name, "size": size} for name, size in sizes.items()])

            def do_read(self, repo, revision_and_name, *_):
                if repo not in hub.files:
                    return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                revision, _, name = revision_and_name.partition("/")
                files = hub.version(repo, revision)
                if files is None:
                    return self.answer(404, {"error": "Invalid rev id"}, X_Error_Code="RevisionNotFound")
                commit = {"X_Repo_Commit": hub.commit(files)}
                if name not in files:
                    return self.answer(
                        404, {"error": "Entry not found"}, X_Error_Code="EntryNotFound", **commit
                    )
                data = files[name]
                headers = commit | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'}
                self.answer(200, data, **headers, Accept_Ranges="bytes")

            def do_preupload(self, repo, rest, body):
                files = []
                for path in [file["path"] for file in json.loads(body)["files"]]:
                    mode = "lfs" if path.endswith(LARGE) else "regular"
                    files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": None})
                self.answer(200, {"files": files})

            def do_batch(self, repo, rest, body):
                objects = []
                for item in json.loads(body)["objects"]:
                    actions = {"upload": {"href": f"{hub.url}/lfs/{item['oid']}", "header": {}}}
                    about = {key: item[key] for key in ("oid", "size")}
                    objects.append(about | {"authenticated": True, "actions": actions})
                self.answer(200, {"transfer": "basic", "objects": objects})

            def do_upload(self, repo, oid, body):
                assert hashlib.sha256(body).hexdigest() == oid
                hub.objects[oid] = body
                self.answer(200)

            def do_commit(self, repo, rest, body):
                for line in map(json.loads, body.splitlines()):
                    value = line["value"]
                    if line["key"] == "file":
                        hub.files[repo][value["path"]] = base64.b64decode(value["content"])
                    elif line["key"] == "lfsFile":
                        hub.files[repo][value["path"]] = hub.objects[value["oid"]]
                commit = hub.commit(hub.files[repo])
                url = f"{hub.url}/{repo}/commit/{commit}"
                self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @staticmethod
    def commit(files):
        """The commit of these files: 40 digits that follow from them."""
        return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()

    def version(self, repo, revision):
        """The files of a revision, named by a tag or its commit; None if there is none."""
        tags = {"": self.files[repo], "main": self.files[repo]} | self.tags.get(repo, {})
        found = [files for name, files in tags.items() if (revision or "") in (name, self.commit(files))]
        return found[0] if found else None

    @staticmethod
    def what(method, path):
        """(kind, repository, rest) of a call."""
        for kind, pattern in CALLS.items():
            if match := re.fullmatch(pattern, path):
                return kind, *match.groups()
        return "unknown", path, ""

    def close(self):
        self.server.shutdown()
        self.server.server_close()

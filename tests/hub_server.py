"""A Hub on the loopback: the calls that huggingface_hub makes, kept in memory, and its ways to fail."""

import base64
import hashlib
import json
import re
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

REPO = "([^/]+/[^/]+)"
CALLS = {  # kind: pattern of the path with two groups, repository and rest
    "whoami": "/api/whoami-v2()()",
    "card": "/api/validate-yaml()()",
    "create": "/api/repos/create()()",
    "preupload": f"/api/models/{REPO}/preupload/(.*)",
    "commit": f"/api/models/{REPO}/commit/(.*)",
    "tree": f"/api/models/{REPO}/tree/(.*)",
    "info": f"/api/models/{REPO}(?:/revision/.*)?()",
    "batch": rf"/{REPO}\.git/info/lfs/objects/batch()",
    "upload": "/lfs()/(.*)",
    "read": f"/{REPO}/resolve/[^/]+/(.*)",
}


class Hub:
    """`files[repo][path]` is what is stored; `calls` lists (method, kind); `refuse` maps kinds to refusals.

    Kinds: those of CALLS; a list of files is a "tree". Refusals: a status number, "429" with Retry-After once
    only, "cut" (the connection ends within the answer), "stall" (no answer for `stall` seconds). `before` is
    called with the kind before each answer. Repositories may be of "tester" and of `organisations`.
    """

    def __init__(self):
        self.files, self.objects, self.private = {}, {}, {}
        self.calls, self.tokens, self.refuse, self.stall = [], set(), {}, 5
        self.organisations, self.before = [], lambda kind: None
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

            def do_card(self, *_):
                self.answer(200, {"errors": [], "warnings": []})

            def do_unknown(self, path, *_):
                self.answer(404, {"error": f"the tests' Hub does not know {self.command} {path}"})

            def do_whoami(self, *_):
                token = {"accessToken": {"role": "write"}}
                orgs = [{"name": name} for name in hub.organisations]
                self.answer(200, {"name": "tester", "type": "user", "auth": token, "orgs": orgs})

            def do_create(self, repo, rest, body):
                asked = json.loads(body)
                owner = asked.get("organization") or "tester"
                if owner not in ("tester", *hub.organisations):
                    return self.answer(403, {"error": f"You may not create repositories of {owner}"})
                repo = f"{owner}/{asked['name']}"
                if repo in hub.files:
                    error = "You already created this model repo"
                    return self.answer(409, {"error": error, "url": f"{hub.url}/{repo}"})
                hub.files[repo] = {}
                hub.private[repo] = asked.get("private", asked.get("visibility") == "private")
                self.answer(200, {"url": f"{hub.url}/{repo}", "name": repo})

            def do_info(self, repo, *_):
                if repo not in hub.files:
                    return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                info = {"id": repo, "modelId": repo, "private": True, "sha": hub.commit(repo)}
                info["siblings"] = [{"rfilename": name} for name in hub.files[repo]]
                self.answer(200, info | {"tags": [], "downloads": 0, "likes": 0})

            def do_tree(self, repo, *_):
                if repo not in hub.files:
                    return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                sizes = {name: len(data) for name, data in hub.files[repo].items()}
                usual = {"type": "file", "oid": "0" * 40}
                self.answer(200, [usual | {"path": name, "size": size} for name, size in sizes.items()])

            def do_read(self, repo, name, *_):
                if repo not in hub.files:
                    return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
                if name not in hub.files[repo]:
                    headers = {"X_Error_Code": "EntryNotFound", "X_Repo_Commit": hub.commit(repo)}
                    return self.answer(404, {"error": "Entry not found"}, **headers)
                data = hub.files[repo][name]
                headers = {"ETag": f'"{hashlib.sha1(data).hexdigest()}"', "X_Repo_Commit": hub.commit(repo)}
                self.answer(200, data, **headers, Accept_Ranges="bytes")

            def do_preupload(self, repo, rest, body):
                files = []
                for path in [file["path"] for file in json.loads(body)["files"]]:
                    mode = "lfs" if path.endswith((".safetensors", ".bin")) else "regular"
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
                commit = hub.commit(repo)
                url = f"{hub.url}/{repo}/commit/{commit}"
                self.answer(200, {"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def commit(self, repo):
        """The commit of a repository: 40 digits that follow from its files."""
        return hashlib.sha1(repr(sorted(self.files[repo].items())).encode()).hexdigest()

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

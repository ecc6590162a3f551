"""MONAI Label's real server app on bundles, asked through its HTTP interface without a socket.

Runs in the environment that scripts/peers makes: label_server.py APP OUT MODEL=VOLUME...; APP holds
main.py and model/ with the bundles. Writes OUT/MODEL.nii.gz and OUT/MODEL.json for each model.
"""

from __future__ import annotations

import json
import os
import sys
from email.parser import BytesParser
from pathlib import Path
from typing import Any

app, out, pairs = Path(sys.argv[1]), Path(sys.argv[2]), [x.split("=") for x in sys.argv[3:]]
(out / "studies").mkdir(parents=True, exist_ok=True)
os.environ["MONAI_LABEL_APP_DIR"] = str(app)
os.environ["MONAI_LABEL_STUDIES"] = str(out / "studies")
os.environ["MONAI_LABEL_APP_CONF"] = json.dumps({"models": ",".join(x for x, _ in pairs)})
os.environ["MONAI_ZOO_SOURCE"] = "local"  # else it asks the model zoo for its list of bundles

from fastapi.testclient import TestClient  # noqa: E402
from monailabel.app import app as server  # noqa: E402

with TestClient(server) as client:
    models = client.get("/info/").json()["models"]
    (out / "info.json").write_text(json.dumps(models))
    for model, volume in pairs:
        with open(volume, "rb") as file:
            answer = client.post(
                f"/infer/{model}",
                data={"params": json.dumps({"device": "cpu"})},
                files={"file": (Path(volume).name, file)},
            )
        answer.raise_for_status()
        head = f"Content-Type: {answer.headers['content-type']}\r\n\r\n".encode()
        parts: dict[Any, Any] = {}
        for part in BytesParser().parsebytes(head + answer.content).walk():
            parts[part.get_param("name", header="content-disposition")] = part
        (out / f"{model}.json").write_bytes(parts["params"].get_payload(decode=True))
        (out / f"{model}.nii.gz").write_bytes(parts["image"].get_payload(decode=True))

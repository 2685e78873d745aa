"""What cannot be served is refused when the server starts, in one line."""

from __future__ import annotations

import pytest

from examples.server import Server, ServerError


@pytest.mark.parametrize(
    ("flags", "env", "reason"),
    [
        (["--tokenizer-worker-num", "2"], {}, r"--tokenizer-worker-num 2: .*load no plugins"),
        ([], {"SGLANG_AMD_MX_RECIPE": "nowhere.json"}, r"nowhere\.json: No such file"),
    ],
    ids=["tokenizer workers", "recipe"],
)
def test_refused_at_start_in_one_line(tiny, tmp_path, preloaded, flags, env, reason):
    arguments = ["--quantization", "amd_mx", *flags]
    server = Server.start(tiny("llama"), tmp_path / "log", flags=arguments, env=env, launch=preloaded)
    with pytest.raises(ServerError, match=reason):
        server.wait()
    server.stop()

"""Writes a campaign's page and picture."""

from __future__ import annotations

import os
from pathlib import Path

from mixforge.cli.database import open_results
from mixforge.cli.findings import newest
from mixforge.cli.naming import make_folder
from mixforge.cli.output import RunFailed
from mixforge.report.findings import gather
from mixforge.report.page import page
from mixforge.report.picture import picture


def write(campaign: str | None, html: Path, svg: Path | None, db: str) -> dict[str, int]:
    """Write the page and, where it is asked for, the picture. Returns the size of each file in bytes."""
    for path in (html, svg):
        if path is not None and path.is_dir():
            raise ValueError(f"{path} is a folder; name the file to write")
    with open_results(db) as results:
        findings = gather(results, newest(results, campaign, db).name)
    texts = {html: page(findings)}
    if svg is not None:
        texts[svg] = picture(findings)
    return {str(path): _replace(path, text.encode()) for path, text in texts.items()}


def _replace(path: Path, content: bytes) -> int:
    """Write a whole file or none: a page that is there is only replaced by a whole one."""
    make_folder(path.parent, "the file")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except OSError as error:
        raise RunFailed(f"{path} cannot be written ({error.strerror}); name another file") from error
    finally:
        partial.unlink(missing_ok=True)
    return len(content)

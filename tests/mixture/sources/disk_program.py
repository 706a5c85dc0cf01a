"""Reads each file and prints what became of it, as JSON lines: `disk_program.py LARGEST_FILE_BYTES FAIL_AFTER,... FILE ...`.

With failing_disk.c loaded, each file in turn is the one that the disk fails at, after each of these numbers of bytes.
"""

from __future__ import annotations

import json
import os
import resource
import sys

from sparsify.errors import UserError
from sparsify.mixture.sources.bad_rows import BadRows
from sparsify.mixture.sources.read import read_documents
from sparsify.recipe.source import SourceSection

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
for after in sys.argv[2].split(","):
    for path in sys.argv[3:]:
        os.environ["FAIL_AFTER"], os.environ["FAIL_NAME"] = after, path
        bad_rows, said, documents = BadRows("web", 1.0), "", 0
        try:
            documents = sum(1 for _ in read_documents("web", SourceSection(token_share=1.0, files=[path]), bad_rows))
        except UserError as error:
            said = f"{type(error).__name__}: {error}"
        print(json.dumps([path, documents, bad_rows.num_bad_rows, said]))
        os.environ["FAIL_NAME"] = ""

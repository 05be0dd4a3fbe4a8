"""polygraphy with v4graph's plugins registered: takes polygraphy's own arguments."""

import os
import sys

from v4graph import trt
from v4graph_plugins.host import Host

os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
Host().register(trt.load("rtx").module)

from polygraphy.tools import main  # noqa: E402: polygraphy chooses its TensorRT when it is imported

sys.exit(main())

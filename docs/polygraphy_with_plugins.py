"""polygraphy with v4graph's plugins registered: takes polygraphy's own arguments."""

import os
import sys
from importlib import import_module

from v4graph import trt
from v4graph_plugins.host import Host

os.environ["POLYGRAPHY_USE_TENSORRT_RTX"] = "1"
Host().register(trt.load("rtx").module)
# polygraphy chooses its TensorRT when it is imported, so after the line above.
sys.exit(import_module("polygraphy.tools").main())

"""The payloads of jobs: A1111's JSON as one typed object that checks itself, for the service and the worker alike.

The service checks what a client sent and freezes the checked form; the worker reads that form with the same classes, so
a bound stands in one place. Knows neither gRPC nor torch.
"""

from services.common.payloads.base import Payload
from services.common.payloads.extras import Edit
from services.common.payloads.generation import Generation
from services.common.payloads.img2img import Img2Img
from services.common.payloads.models import used
from services.common.payloads.reading import check, parse
from services.common.payloads.txt2img import Txt2Img

__all__ = ["Edit", "Generation", "Img2Img", "Payload", "Txt2Img", "check", "parse", "used"]

"""The payloads of jobs: A1111's JSON as one typed object that checks itself, for the service and the worker alike.

The service checks what a client sent and freezes the checked form; the worker reads that form with the same classes, so
a bound stands in one place. Knows neither gRPC nor torch.
"""

from payloads.base import Payload
from payloads.extras import Edit
from payloads.generation import Generation
from payloads.img2img import Img2Img
from payloads.models import used
from payloads.reading import check, parse
from payloads.txt2img import Txt2Img

__all__ = ["Edit", "Generation", "Img2Img", "Payload", "Txt2Img", "check", "parse", "used"]

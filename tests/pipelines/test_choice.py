"""Which decoder a configuration gets on which device."""

import pytest

from genkd.errors import UserError
from genkd.pipelines.graph import Kind, choose_decoder

SMALL, LARGE = Kind("h264", 336, 256, 9), Kind("h264", 1920, 1088, 9)


@pytest.mark.parametrize(
    ("wanted", "kinds", "device", "found"),
    [
        ("auto", [SMALL], "cpu", "pyav"),
        ("auto", [Kind("vp9", 336, 256, 9)], "cpu", "pyav"),
        ("auto", [SMALL], "cuda", "pyav"),
        ("auto", [LARGE], "cuda", "dali"),
        ("auto", [LARGE, SMALL], "cuda", "dali"),
        ("auto", [LARGE, Kind("h264", 1920, 1080, 9)], "cuda", "pyav"),  # 1080 is no multiple of 16
        ("auto", [LARGE, Kind("prores", 1920, 1088, 1)], "cuda", "pyav"),
        ("dali", [SMALL], "cuda", "dali"),
        ("hybrid", [SMALL], "cuda", "hybrid"),
        ("dali", [Kind("mjpeg", 342, 256, 9)], "cuda", "dali"),
        ("auto", [], "cuda", "pyav"),
    ],
)
def test_the_decoder_that_is_chosen(wanted, kinds, device, found, caplog):
    assert choose_decoder(wanted, kinds, device) == found
    assert not caplog.records


def test_decoders_made_anew_are_told(caplog):
    assert choose_decoder("dali", [SMALL, Kind("h264", 342, 256, 3)], "cuda") == "dali"
    assert "25 % of the videos have sides that are no multiples of 16 pixels" in caplog.text


def test_what_nvdec_cannot_decode_is_refused():
    with pytest.raises(UserError, match="NVDEC decodes vp9 from 128x128 pixels on, and there are videos of 64x48"):
        choose_decoder("dali", [LARGE, Kind("vp9", 64, 48, 1)], "cuda")
    with pytest.raises(UserError, match="DALI does not decode h264 on cpu"):
        choose_decoder("hybrid", [SMALL], "cpu")

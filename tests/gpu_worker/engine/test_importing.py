"""What is imported before the first job."""

import gc

from gpu_worker.engine.importing import uncollected


def test_what_was_imported_is_left_out_of_later_collections() -> None:
    before = gc.get_freeze_count()
    with uncollected():
        assert not gc.isenabled()
        imported: list[object] = [[]]
    assert gc.isenabled()
    assert gc.get_freeze_count() > before
    assert not any(found is imported for found in gc.get_objects())
    gc.unfreeze()

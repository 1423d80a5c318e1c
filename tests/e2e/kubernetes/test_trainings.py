"""Trainings on Kubernetes through REST: our trainer in the pods of a Job, whose pods and nodes go while it trains.

Needs KUBEBUILDER_ASSETS: `make test-k8s`.
"""

from __future__ import annotations

import itertools
import re
from typing import Any

import pytest
from kubernetes_asyncio import client

from tests.e2e.conftest import Api, wait_for
from tests.e2e.kubernetes.site import PATIENCE, Site
from tests.e2e.school import School, open_school

pytestmark = [pytest.mark.k8s, pytest.mark.timeout(600)]

NUM_EPOCHS, STEPS = 32, 8  # of each epoch
GOING_ON = re.compile(rf"going on after epoch (\d+) of {NUM_EPOCHS}, step (\d+)")


@pytest.fixture(scope="module")
def school(painter: Api) -> School:
    return open_school(painter, "tiny.safetensors")


class Lesson:
    """A training of some time, with a file of every fourth epoch, and its pods."""

    def __init__(self, school: School, site: Site, name: str) -> None:
        self._school, self._site, self._name = school, site, name
        self.id = school.begin(
            output_name=name, max_train_epochs=NUM_EPOCHS, save_every_n_epochs=4, sample_every_n_epochs=0
        )
        self._told = school.events(self.id)

    def has_saved(self, epoch: int) -> None:
        """Waits until the epoch's file is there; the state after any earlier epoch is kept before that."""
        name = f"{self._name}-{epoch:06}.safetensors"
        assert any(event.get("saved", {}).get("name") == name for event in self._told)

    def goes_on(self) -> int:
        """Waits until another trainer goes on; answers after which epoch."""
        for event in self._told:
            if found := GOING_ON.fullmatch(event.get("log", {}).get("line", "")):
                epoch, step = map(int, found.groups())
                assert step == epoch * STEPS
                return epoch
        raise AssertionError(f"it did not go on: {self._school.get(self.id)}")

    def pod(self) -> Any:
        """The pod that trains."""
        (pod,) = [pod for pod in self._site.pods(self.id) if pod.status.phase == "Running"]
        return pod

    def ends(self) -> dict[str, Any]:
        """Waits for the end; answers the training."""
        assert any("ended" in event for event in self._told)
        return self._school.get(self.id)

    def points(self) -> list[dict[str, Any]]:
        """The loss curve."""
        points: list[dict[str, Any]] = self._school.api.ok("GET", f"/trainings/{self.id}/metrics")["points"]
        return points

    def files(self) -> list[str]:
        """The files of its checkpoint, which is Active."""
        row = self._school.checkpoint(self.id)
        assert row is not None
        assert row["status"] == "Active"
        names: list[str] = row["name"]
        return names

    def leaves_nothing(self) -> None:
        """Waits until nothing of it is in the cluster any more."""
        wait_for(lambda: not [name for name in self._site.objects() if self.id in name], PATIENCE)


def check_completed(lesson: Lesson, epochs: list[int]) -> None:
    """Checks that the training has ended well, and that its trainers began behind these epochs and nowhere else.

    Each was stopped when a file had been saved four epochs or more after it began, and so the state of three or more.
    """
    assert all(later >= earlier + 3 for earlier, later in itertools.pairwise(epochs)), epochs
    ended = lesson.ends()
    assert ended["job_status"] == "Completed", ended
    points = lesson.points()
    assert [point["step"] for point in points] == list(range(1, NUM_EPOCHS * STEPS + 1)), "no step is missing"
    # A trainer's first average is of its first loss alone, and a step that was done again is that of the last trainer.
    begun = [point["step"] for point in points if point["averageLoss"] == point["loss"]]
    assert begun == [epoch * STEPS + 1 for epoch in epochs]
    assert len(lesson.files()) == NUM_EPOCHS // 4
    lesson.leaves_nothing()


def test_a_training_goes_on_after_its_last_epoch_when_its_pods_are_killed_and_one_that_was_evicted_counts_for_none(
    school: School, site: Site
) -> None:
    lesson = Lesson(school, site, "tough")
    wait_for(lambda: f"Job esd-{lesson.id}" in site.objects(), PATIENCE)
    epochs = [0]
    for end in (site.evict, site.kill, site.kill):  # of three attempts, the third one is the last
        lesson.has_saved(epochs[-1] // 4 * 4 + 8)
        end(lesson.pod())
        epochs.append(lesson.goes_on())
    check_completed(lesson, epochs)


def test_a_training_goes_on_in_another_pod_when_its_own_is_gone_or_its_node_is_lost_or_away(
    school: School, site: Site
) -> None:
    lesson = Lesson(school, site, "wanderer")
    lesson.has_saved(8)
    site.delete(lesson.pod())
    epochs = [0, lesson.goes_on()]
    lost = lesson.pod().spec.node_name
    lesson.has_saved(epochs[-1] // 4 * 4 + 8)
    site.do(site.nodes[lost].die())
    epochs.append(lesson.goes_on())
    assert lesson.pod().spec.node_name in site.nodes.keys() - {lost}
    # As its cloud does, so that the pods that were there go too.
    site.do(client.CoreV1Api(site.api).delete_node(lost))
    site.do(site.add_node(f"{lost}-again"))
    away = site.nodes[lesson.pod().spec.node_name]
    lesson.has_saved(epochs[-1] // 4 * 4 + 8)
    site.do(away.fall_silent())
    epochs.append(lesson.goes_on())
    site.come_back(away)  # which does not end the training that went on elsewhere
    check_completed(lesson, epochs)

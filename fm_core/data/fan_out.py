"""Writing a data set from several machines: begin once, write parts anywhere, finish once.

Parts may be written twice or by two at a time: the bytes are the same, and so is the result.
"""

from collections.abc import Callable

from fm_core.config.data import DataSection
from fm_core.data.manifest import Manifest
from fm_core.data.plan import make_plan, record_plan
from fm_core.data.shards import allowed_rejections, finish, read_complete
from fm_core.data.store import Store
from fm_core.data.writing import missing_tasks, write_part
from fm_core.errors import UserError


def begin_dataset(config: DataSection) -> list[str]:
    """Record what is to be made; the names of parts that lack shards, none for a complete data set.

    Raises UserError if the source is missing or wrong, or another recipe is at this name.
    """
    if read_complete(config) is not None:
        return []
    store = Store.at(config.root, config.name)
    plan = make_plan(config)
    record_plan(store, plan)
    store.remove_stale_stages()
    return list(dict.fromkeys(task.part.name for task in missing_tasks(store, plan)[0]))


def write_named_part(
    config: DataSection, part: str, on_images: Callable[[int], None] = lambda done: None
) -> int:
    """Write what a part lacks; the images written. on_images gets the images so far.

    Raises UserError if the part is damaged or alone holds too many unreadable images.
    """
    store = Store.at(config.root, config.name)
    plan = make_plan(config)
    tasks = [task for task in missing_tasks(store, plan)[0] if task.part.name == part]
    done = rejected = 0
    for commit in write_part(store, plan, tasks) if tasks else ():
        done += commit.images
        rejected += len(commit.rejected)
        if rejected > allowed_rejections(plan, config):
            raise UserError(
                f"data.max_quarantined: {rejected} images of {part} cannot be used, the first "
                f"{commit.rejected[0].key}: {commit.rejected[0].reason}"
            )
        on_images(done)
    return done


def finish_dataset(config: DataSection) -> Manifest:
    """The manifest, written now if every part is; UserError that counts what is missing."""
    complete = read_complete(config)
    return complete or finish(Store.at(config.root, config.name), make_plan(config), config)

"""Backends as a user might write them, by SGLang's interface."""

from sglang.srt.mem_cache.hicache_storage import HiCacheStorage


class OldBackend(HiCacheStorage):
    """Without the interface for pools."""

    def __init__(self, storage_config, kwargs) -> None:
        self.objects = {}

    def get(self, key, target_location=None, target_sizes=None):
        return self.objects.get(key)

    def batch_get(self, keys, target_locations=None, target_sizes=None):
        return [self.get(key) for key in keys]

    def set(self, key, value=None, target_location=None, target_sizes=None):
        self.objects[key] = value.clone()
        return True

    def batch_set(self, keys, values=None, target_locations=None, target_sizes=None):
        return all(self.set(key, value) for key, value in zip(keys, values, strict=True))

    def exists(self, key):
        return key in self.objects


class OwnBackend(OldBackend):
    """With it."""

    def batch_get_v2(self, transfers, extra_info=None):
        return {each.name: self._each(each, self._load) for each in transfers}

    def batch_set_v2(self, transfers, extra_info=None):
        return {each.name: self._each(each, self._save) for each in transfers}

    def _each(self, transfer, move):
        pool = self.registered_pools[transfer.name]
        slots = transfer.host_indices.tolist()
        return [move(pool, key, slot) for key, slot in zip(transfer.keys, slots, strict=True)]

    def _load(self, pool, key, slot):
        if key in self.objects:
            pool.set_from_flat_data_page(slot, self.objects[key])
        return key in self.objects

    def _save(self, pool, key, slot):
        return self.set(key, pool.get_data_page(slot, flat=True))

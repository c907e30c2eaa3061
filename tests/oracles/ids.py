"""Slow twin of the id map: dictionaries and loops, one id at a time."""


class DictIds:
    """Ids with a row, and ids that wait: id -> [count, last step]."""

    def __init__(self, config, capacity):
        self.config, self.capacity = config, capacity
        self.members, self.waiting = {}, {}

    def meet(self, keys, step):
        """Return the ids that have a row now, and those that got it in this call."""
        due = []
        for key in keys:
            if key in self.members:
                see(self.members[key], step)
            elif self.config.min_sightings == 1:
                due.append((key, 1))
            elif key in self.waiting:
                see(self.waiting[key], step)
        if self.config.min_sightings > 1:
            others = [key for key in keys if key not in self.members]
            fresh = [key for key in others if key not in self.waiting]
            self.make_room(self.waiting, len(fresh), step, "lru")
            for key in fresh[: self.capacity - len(self.waiting)]:
                self.waiting[key] = [1, step]
            due = [(key, self.waiting[key][0]) for key in others if key in self.waiting]
        due = [(key, count) for key, count in due if count >= self.config.min_sightings]
        self.make_room(self.members, len(due), step, self.config.eviction)
        due.sort(key=lambda one: (-one[1], one[0]))
        admitted = due[: self.capacity - len(self.members)]
        for key, count in admitted:
            self.members[key] = [count, step]
            self.waiting.pop(key, None)
        return {key for key in keys if key in self.members}, {key for key, _ in admitted}

    def make_room(self, entries, num, step, policy):
        room = self.capacity - len(entries)
        if num <= room:
            return
        wanted = max(num - room, int(self.config.evict_share * self.capacity))

        def order(key):
            count, last = entries[key]
            return (count, last, key) if policy == "lfu" else (last, count, key)

        old = sorted((key for key in entries if entries[key][1] < step), key=order)
        for key in old[:wanted]:
            del entries[key]


def see(entry, step):
    if entry[1] != step:
        entry[0] += 1
    entry[1] = step

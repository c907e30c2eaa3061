"""Slow twin of history/asof.py: one request at a time, straight from the definition of visible."""


def newest_visible_slow(requests, events, max_len, retention_us=None):
    """Return per request the list of event rows, oldest first."""
    answers = []
    for user, request_ts in zip(*requests, strict=True):
        seen = []
        for row, (owner, event_ts, available_ts) in enumerate(zip(*events, strict=True)):
            if owner != user:
                continue
            if not (event_ts < request_ts and available_ts <= request_ts):
                continue
            if retention_us is not None and event_ts < request_ts - retention_us:
                continue
            seen.append((event_ts, row))
        seen.sort()
        answers.append([row for _, row in seen][-max_len:] if max_len else [])
    return answers

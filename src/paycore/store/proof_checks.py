"""The checks of the audit that a database makes by itself, over one range of payment ids, as SQL that all of them take.

Each returns only what is wrong: payment_id first, then what helps to look into it, by the names of the columns. The
tables stand for their part of the range, by the letters of ``WITH_RANGE``; every join is by payment_id, because all
that is judged about a payment has its id, and a sharded engine joins by nothing else. A check leaves out what a kind
nearer to the cause names already (``domain.audit``).
"""

from typing import NamedTuple

from paycore.domain.audit import AuditKind

WITH_RANGE = """
WITH p AS NOT MATERIALIZED (SELECT * FROM payment WHERE payment_id > :after AND payment_id <= :last),
  a AS NOT MATERIALIZED (SELECT * FROM channel_order WHERE payment_id > :after AND payment_id <= :last),
  o AS NOT MATERIALIZED (SELECT * FROM payment_outcome WHERE payment_id > :after AND payment_id <= :last),
  e AS NOT MATERIALIZED (SELECT * FROM excess_payment WHERE payment_id > :after AND payment_id <= :last),
  r AS NOT MATERIALIZED (SELECT * FROM refund WHERE payment_id > :after AND payment_id <= :last),
  t AS NOT MATERIALIZED (SELECT * FROM refund_try WHERE payment_id > :after AND payment_id <= :last),
  f AS NOT MATERIALIZED (SELECT * FROM refund_result WHERE payment_id > :after AND payment_id <= :last),
  q AS NOT MATERIALIZED (SELECT * FROM queried_paid WHERE payment_id > :after AND payment_id <= :last)
"""

# The numbers of ``domain.verdicts``: PAID and CLOSED; REFUNDED, REFUSED and RETURNED_BY_CHANNEL.


class Check(NamedTuple):
    """One statement and what its rows are. Parameters: after (exclusive), last."""

    kind: AuditKind
    sql: str


CHECKS = (
    Check(
        AuditKind.ATTEMPT_WITHOUT_PAYMENT,
        """
SELECT a.payment_id, a.attempt, a.channel, a.account FROM a
WHERE NOT EXISTS (SELECT 1 FROM p WHERE p.payment_id = a.payment_id)
""",
    ),
    Check(
        AuditKind.OUTCOME_WITHOUT_PAYMENT,
        """
SELECT o.payment_id, o.state, o.attempt, o.channel_trade_no FROM o
WHERE NOT EXISTS (SELECT 1 FROM p WHERE p.payment_id = o.payment_id)
""",
    ),
    Check(
        AuditKind.OUTCOME_INCOHERENT,
        """
SELECT o.payment_id, o.state, o.channel_trade_no, o.currency FROM o
WHERE (o.state = 2 AND o.channel_trade_no = '') OR (o.state = 3 AND (o.channel_trade_no <> '' OR o.currency <> ''))
""",
    ),
    Check(
        AuditKind.KEPT_ATTEMPT_MISSING,
        """
SELECT o.payment_id, o.attempt, o.channel_trade_no FROM o
WHERE o.state = 2 AND NOT EXISTS (SELECT 1 FROM a WHERE a.payment_id = o.payment_id AND a.attempt = o.attempt)
  AND EXISTS (SELECT 1 FROM p WHERE p.payment_id = o.payment_id)
""",
    ),
    Check(
        AuditKind.KEPT_TERMS_DIFFER,
        """
SELECT o.payment_id, o.attempt, o.channel_trade_no, p.amount_minor AS asked_minor, o.amount_minor AS kept_minor,
  p.currency AS asked_currency, o.currency AS kept_currency
FROM o JOIN p ON p.payment_id = o.payment_id
WHERE o.state = 2 AND (o.amount_minor <> p.amount_minor OR o.currency <> p.currency)
""",
    ),
    Check(
        AuditKind.KEPT_IS_EXCESS,
        """
SELECT e.payment_id, e.attempt, e.channel_trade_no FROM e
WHERE EXISTS (SELECT 1 FROM o WHERE o.payment_id = e.payment_id AND o.attempt = e.attempt
  AND o.channel_trade_no = e.channel_trade_no AND o.state = 2)
""",
    ),
    Check(
        AuditKind.EXCESS_WITHOUT_PAYMENT,
        """
SELECT e.payment_id, e.attempt, e.channel_trade_no FROM e
WHERE NOT EXISTS (SELECT 1 FROM p WHERE p.payment_id = e.payment_id)
""",
    ),
    Check(
        AuditKind.EXCESS_ATTEMPT_MISSING,
        """
SELECT e.payment_id, e.attempt, e.channel_trade_no FROM e
WHERE NOT EXISTS (SELECT 1 FROM a WHERE a.payment_id = e.payment_id AND a.attempt = e.attempt)
  AND EXISTS (SELECT 1 FROM p WHERE p.payment_id = e.payment_id)
""",
    ),
    Check(
        AuditKind.REFUND_WITHOUT_TRY,
        """
SELECT r.payment_id, r.refund_no FROM r
WHERE NOT EXISTS (SELECT 1 FROM t WHERE t.payment_id = r.payment_id AND t.refund_no = r.refund_no)
""",
    ),
    Check(
        AuditKind.TRY_WITHOUT_REFUND,
        """
SELECT t.payment_id, t.refund_no, t.seq FROM t
WHERE NOT EXISTS (SELECT 1 FROM r WHERE r.payment_id = t.payment_id AND r.refund_no = t.refund_no)
""",
    ),
    Check(
        AuditKind.TRY_NUMBER_WRONG,
        """
SELECT t.payment_id, t.refund_no, t.seq, t.channel_refund_no FROM t
WHERE t.channel_refund_no <> CAST(t.payment_id AS TEXT) || t.refund_no
  || CASE WHEN t.seq < 10 THEN '0' ELSE '' END || CAST(t.seq AS TEXT)
""",
    ),
    Check(
        AuditKind.TRY_TOO_EARLY,
        """
SELECT t.payment_id, t.refund_no, t.seq FROM t
WHERE t.seq > 1
  AND NOT EXISTS (SELECT 1 FROM f WHERE f.payment_id = t.payment_id AND f.refund_no = t.refund_no
    AND f.seq = t.seq - 1 AND f.result = 5)
  AND NOT EXISTS (SELECT 1 FROM f JOIN f AS g ON g.payment_id = f.payment_id AND g.refund_no = f.refund_no
      AND g.seq > f.seq
    WHERE f.payment_id = t.payment_id AND f.refund_no = t.refund_no AND f.result IN (4, 6) AND g.result IN (4, 6))
""",
    ),
    Check(
        AuditKind.TRY_STATE_WRONG,
        """
SELECT t.payment_id, t.refund_no, t.seq, t.state, f.result
FROM t LEFT JOIN f ON f.payment_id = t.payment_id AND f.refund_no = t.refund_no AND f.seq = t.seq
WHERE f.result <> t.state OR (f.result IS NULL AND t.state IN (4, 5, 6))
""",
    ),
    Check(
        AuditKind.REFUNDED_TWICE,
        """
SELECT f.payment_id, f.refund_no, count(*) AS times FROM f
WHERE f.result IN (4, 6) GROUP BY f.payment_id, f.refund_no HAVING count(*) > 1
""",
    ),
    Check(
        AuditKind.RESULT_WITHOUT_TRY,
        """
SELECT f.payment_id, f.refund_no, f.seq, f.result FROM f
WHERE NOT EXISTS (SELECT 1 FROM t WHERE t.payment_id = f.payment_id AND t.refund_no = f.refund_no AND t.seq = f.seq)
""",
    ),
)

# What lies in quarantine about these is asked by a statement of its own: evidence is spread by its own key.
QUERIED_UNJUDGED = """
SELECT q.payment_id, q.attempt, q.recorded_at_ms AS queried_at_ms FROM q
WHERE q.recorded_at_ms < :unjudged_before_ms
  AND NOT EXISTS (SELECT 1 FROM o WHERE o.payment_id = q.payment_id AND o.attempt = q.attempt)
  AND NOT EXISTS (SELECT 1 FROM e WHERE e.payment_id = q.payment_id AND e.attempt = q.attempt)
"""

EVIDENCE = "SELECT payment_id, attempt FROM quarantine WHERE payment_id IN :ids"

EXCESS = """
SELECT e.payment_id, e.attempt, e.channel_trade_no, e.reason, e.amount_minor, e.currency, e.recorded_at_ms,
  o.state, o.attempt, o.channel_trade_no
FROM e LEFT JOIN o ON o.payment_id = e.payment_id
"""

# done: the money is back; failed: refused for good, and no try follows the last refusal.
REFUNDS = """
SELECT r.payment_id, r.refund_no, r.attempt, r.channel_trade_no, r.reason, r.amount_minor, r.currency,
  r.recorded_at_ms, o.state, o.attempt, o.channel_trade_no, o.amount_minor, o.currency,
  CASE WHEN ends.done > 0 THEN 1 ELSE 0 END,
  CASE WHEN ends.refused > 0 AND ends.refused >= coalesce(tries.newest, 0) THEN 1 ELSE 0 END
FROM r LEFT JOIN o ON o.payment_id = r.payment_id
  LEFT JOIN (SELECT f.payment_id, f.refund_no, max(CASE WHEN f.result IN (4, 6) THEN 1 ELSE 0 END) AS done,
      max(CASE WHEN f.result = 5 THEN f.seq ELSE 0 END) AS refused
    FROM f GROUP BY f.payment_id, f.refund_no) AS ends
    ON ends.payment_id = r.payment_id AND ends.refund_no = r.refund_no
  LEFT JOIN (SELECT t.payment_id, t.refund_no, max(t.seq) AS newest FROM t GROUP BY t.payment_id, t.refund_no) AS tries
    ON tries.payment_id = r.payment_id AND tries.refund_no = r.refund_no
"""

COUNTS = (
    "SELECT count(*) FROM p",
    "SELECT count(*) FROM o WHERE o.state = 2",
    "SELECT count(*) FROM t WHERE t.state = 7",
)
"""How many payments there are, how many are paid, and how many tries a person was told of."""

NEXT_RANGE = """
SELECT min(bound) FROM (
  SELECT * FROM (SELECT payment_id AS bound FROM payment WHERE payment_id > :after
    ORDER BY payment_id LIMIT 1 OFFSET :rows) AS in_payment
  UNION ALL SELECT * FROM (SELECT payment_id FROM channel_order WHERE payment_id > :after
    ORDER BY payment_id LIMIT 1 OFFSET :rows) AS in_channel_order
  UNION ALL SELECT * FROM (SELECT payment_id FROM payment_outcome WHERE payment_id > :after
    ORDER BY payment_id LIMIT 1 OFFSET :rows) AS in_payment_outcome
  UNION ALL SELECT * FROM (SELECT payment_id FROM excess_payment WHERE payment_id > :after
    ORDER BY payment_id LIMIT 1 OFFSET :rows) AS in_excess_payment
  UNION ALL SELECT * FROM (SELECT payment_id FROM refund WHERE payment_id > :after
    ORDER BY payment_id LIMIT 1 OFFSET :rows) AS in_refund
  UNION ALL SELECT * FROM (SELECT payment_id FROM refund_try WHERE payment_id > :after
    ORDER BY payment_id LIMIT 1 OFFSET :rows) AS in_refund_try
  UNION ALL SELECT * FROM (SELECT payment_id FROM refund_result WHERE payment_id > :after
    ORDER BY payment_id LIMIT 1 OFFSET :rows) AS in_refund_result
  UNION ALL SELECT * FROM (SELECT payment_id FROM queried_paid WHERE payment_id > :after
    ORDER BY payment_id LIMIT 1 OFFSET :rows) AS in_queried_paid
) AS bounds
"""

QUARANTINE = "SELECT count(*), min(first_seen_at_ms) FROM quarantine WHERE is_open = 1"

"""Many runs: what is to do (plan), where it is done (engine, worker, bench), how groups are timed, what is kept.

    plan ── cells, judged against what lies on the disk
    session ── group after group: failures, Ctrl-C, progress
      └── timing ── one group: alone first, then interleaved rounds
            └── engine ── a worker process (or this one), which holds a bench of runs

The parent's side imports no torch.
"""

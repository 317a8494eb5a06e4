import sys, time
from benchmarks import common, rounds
for f in rounds.run(common.Options(quick=True)):
    print(f.name, f.median, common.spread(f.samples), f.peer_median, common.spread(f.peer_samples), f.judged, f.target)

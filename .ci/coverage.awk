# Turns what llvm-cov exports into the table of .ci/coverage, and holds docs/uncovered.md against it.
# awk -f coverage.awk -v floor=PERCENT -v unexplained=LINES -v uncovered=FILE docs/uncovered.md LCOV

# The reasons: "| `core/file.rs` | `function` | reason |".
FILENAME ~ /uncovered\.md$/ {
  if ($0 ~ /^\| `/) {
    split($0, part, "`")
    reason = $0
    sub(/^[^|]*\|[^|]*\|[^|]*\| */, "", reason)
    sub(/ *\|$/, "", reason)
    if (reason == "") { print "coverage: no reason in: " $0; bad = 1 }
    reasons[part[2] " " part[4]] = reason
  }
  next
}

/^SF:/ {
  path = substr($0, 4)
  name = path
  sub(/.*\/replicator\/src\//, "", name)
  read_source(path)
  total = covered = 0
  next
}
/^DA:/ {
  split(substr($0, 4), field, ",")
  line = field[1] + 0
  if (line >= tests_from) next
  total++
  if (field[2] > 0) { covered++; next }
  # The text of an assertion that held explains itself, and so does a planted defect, which this build does not have.
  kind = by_itself[line]
  printf "%s:%d [%s] %s%s\n", name, line, function_of[line], kind ? "(" kind ") " : "", text[line] > uncovered
  if (kind) { explained[kind]++; next }
  missing[name " " function_of[line]]++
  next
}
/^end_of_record/ {
  if (total == 0) next
  rows[++files] = sprintf("%-30s %6d %6d %7.1f %%", name, total, covered, 100 * covered / total)
  lines += total
  hit += covered
  lines_in[substr(name, 1, index(name, "/") - 1)] += total
  hit_in[substr(name, 1, index(name, "/") - 1)] += covered
}

# Where functions and assertions begin and end, and where the tests of the file do. The layout is rustfmt's.
function read_source(path,    n, current, closing, class, source) {
  delete text; delete function_of; delete by_itself
  tests_from = 1e9; n = 0; current = "-"; closing = ""
  while ((getline source < path) > 0) {
    n++
    text[n] = source
    if (source ~ /^#\[cfg\(test\)\]/ && tests_from == 1e9) tests_from = n
    if (match(source, /(^| )fn [A-Za-z_0-9]+/)) {
      current = substr(source, RSTART, RLENGTH)
      sub(/.*fn /, "", current)
    }
    function_of[n] = current
    known[name " " current]
    if (closing != "") by_itself[n] = class
    if (closing != "" && index(source, closing) == 1) closing = ""
    else if (closing == "" && source ~ /(assert|assert_eq|assert_ne|debug_assert|panic|unreachable)!\($/) {
      match(source, /^ */)
      closing = substr(source, 1, RLENGTH) ")"
      class = "assertion"
    } else if (closing == "" && source ~ /planted\(Fault::.*(\{|=> *\{)$/) {
      match(source, /^ */)
      closing = substr(source, 1, RLENGTH) "}"
      class = "planted defect"
    }
    if (source ~ /(panic|unreachable)!\(/) by_itself[n] = "assertion"
  }
  close(path)
}

END {
  print ""
  printf "%-30s %6s %6s %9s\n", "file", "lines", "covered", ""
  for (i = 1; i <= files; i++) print rows[i]
  for (part_name in lines_in)
    printf "%-30s %6d %6d %7.1f %%\n", "replicator::" part_name, lines_in[part_name], hit_in[part_name], \
      100 * hit_in[part_name] / lines_in[part_name]
  if (lines < 1000) { print "coverage: only " lines + 0 " lines were seen: the instrumentation is missing"; exit 1 }
  percent = 100 * hit / lines
  printf "%-30s %6d %6d %7.2f %%  (of the rest, %d are texts of assertions, %d planted defects)\n", \
    "line coverage", lines, hit, percent, explained["assertion"], explained["planted defect"]
  for (place in missing) {
    if (place in reasons) continue
    print "no reason: " missing[place] " lines of " place >> uncovered
    left += missing[place]
  }
  printf "coverage: %d lines without a reason in docs/uncovered.md; at most %d may be\n", left, unexplained
  if (left > unexplained) bad = 1
  # Which races the seeds of a run meet changes with the code: to reach more is no fault.
  for (place in reasons) {
    if (place in missing) continue
    if (place in known) { reached++; continue }
    print "coverage: docs/uncovered.md is stale: there is no " place; bad = 1
  }
  if (reached) printf "coverage: %d functions that docs/uncovered.md names are reached as a whole now\n", reached
  if (percent < floor) { printf "coverage: %.2f %% is below the floor of %s %%\n", percent, floor; bad = 1 }
  exit bad
}

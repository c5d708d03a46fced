"""The bugs, by name. Guards are rigs where a rig is what finds such a bug, else the test that names the rule."""

from tests.museum import Edit, Exhibit

BOOKKEEPER, LEDGER, STORE, DAEMON = "bridge/bookkeeper.py", "bridge/ledger.py", "bridge/store.py", "bridge/daemon.py"
KNOWN, GEMINI_LINES = "bridge/tools/known.py", "bridge/tools/gemini_lines.py"
SERVER, RECEIVER, USAGE = "bridge/web/server.py", "bridge/web/receiver.py", "bridge/usage.py"
SCHEDULES = "tests/rigs/test_schedule.py::test_every_schedule_adds_up_to_the_oracle"
POWER = "tests/rigs/test_disk.py::test_whatever_the_power_leaves_what_was_acknowledged_is_there"
KILLS = "tests/rigs/test_kill.py::test_nothing_is_lost_and_nothing_counts_twice"
DAMAGE = "tests/rigs/test_damage.py::test_damage_is_found_and_nothing_shows_less"
NTH_STATEMENT = "tests/test_store.py::test_the_nth_statement_fails"

EXHIBITS: dict[str, Exhibit] = {
    "ack_early": Exhibit(
        "a request is acknowledged after its commit",
        (
            Edit(
                LEDGER,
                "            receipts, change = bookkeeper.post(",
                "            early = [Receipt(1, 0, ())] * len(group)\n"
                "            self._loop.call_soon_threadsafe(self._finish, group, early, None, 0.0)\n"
                "            receipts, change = bookkeeper.post(",
            ),
        ),
        (KILLS,),
    ),
    "ack_before_sync": Exhibit(
        "an acknowledged commit is synced",
        (Edit(STORE, '"synchronous = full"', '"synchronous = normal"'),),
        (POWER,),
    ),
    "publish_before_commit": Exhibit(
        "nothing is shown before its commit returned",
        (
            Edit(
                BOOKKEEPER,
                "            self._write(books)\n",
                "            self._write(books)\n            self.early(books)\n",
            ),
            Edit(
                LEDGER,
                "        call = self._loop.call_soon_threadsafe\n",
                "        call = self._loop.call_soon_threadsafe\n"
                "        bookkeeper.early = lambda books: self.totals.update(books.totals)\n",
            ),
        ),
        (NTH_STATEMENT,),
    ),
    "no_identity": Exhibit(
        "a delta point counts once",
        (Edit(BOOKKEEPER, "if identity in cycle.members:", "if False:"),),
        (SCHEDULES,),
    ),
    "no_body_hash": Exhibit(
        "a body without identities counts once",
        (Edit(BOOKKEEPER, "needs_hash = _needs_body_hash(origin, stream, point)", "needs_hash = False"),),
        (SCHEDULES,),
    ),
    "body_hash_only": Exhibit(
        "points count once whatever batch brings them",
        (
            Edit(BOOKKEEPER, "if identity in cycle.members:", "if False:"),
            Edit(BOOKKEEPER, "needs_hash = _needs_body_hash(origin, stream, point)", "needs_hash = True"),
        ),
        (KILLS,),
    ),
    "watermark": Exhibit(
        "a late point is no repeat",
        (
            Edit(
                BOOKKEEPER,
                "            identity = delta_identity(stream.id, point)\n",
                "            if point.time < self._store.writer_by_id(writer).latest:\n                return False\n"
                "            identity = delta_identity(stream.id, point)\n",
            ),
        ),
        (SCHEDULES,),
    ),
    "cumulative_in_full": Exhibit(
        "a cumulative point adds what it exceeds its run by",
        (Edit("bridge/temporality.py", "return subtract(value, run.highest), Run", "return value, Run"),),
        (SCHEDULES,),
    ),
    "reset_by_value": Exhibit(
        "a lower cumulative value of the same start is late, not a reset",
        (
            Edit(
                "bridge/temporality.py",
                "        return 0, Run(run.highest, first, last)",
                "        return value, Run(value, first, last)",
            ),
        ),
        (SCHEDULES,),
    ),
    "purge_by_own_clock": Exhibit(
        "no point is compared with the bridge's clock",
        (
            Edit(
                BOOKKEEPER,
                "            identity = delta_identity(stream.id, point)\n",
                "            if point.time // 1_000_000 < self._now - self._settings.retention_ms:\n"
                "                return Drop.TOO_OLD\n"
                "            identity = delta_identity(stream.id, point)\n",
            ),
        ),
        ("tests/test_cases.py::test_story",),
    ),
    "forgotten_without_a_mark": Exhibit(
        "what was forgotten is refused, not counted again",
        (Edit(STORE, 'self.execute("update writer set forgotten = latest where id = ?", (writer,))', "pass"),),
        (SCHEDULES,),
    ),
    "believes_a_clock_that_was_set": Exhibit(
        "a clock that was just set makes nothing old",
        (Edit(DAEMON, "if abs(self._offset - before) > CLOCK_STEP_SECONDS * 1000:", "if False:"),),
        ("tests/test_daemon.py::test_a_clock_that_was_set_makes_nothing_old_for_an_hour",),
    ),
    "comes_back_where_it_was": Exhibit(
        "a series that returns is a new counter",
        (Edit(BOOKKEEPER, "replace(row, base=row.value or 0, born", "replace(row, born"),),
        (SCHEDULES,),
    ),
    "cut_money": Exhibit(
        "money is rounded to the nano-dollar, so that sums do not depend on who sent it",
        (Edit(BOOKKEEPER, "value = round(value * origin.scale)", "value = int(value * origin.scale)"),),
        ("tests/test_ledger_properties.py::test_costs_add_up_to_the_nano_dollar_in_any_order",),
    ),
    "exponent_format": Exhibit(
        "XRG is shown plain digits",
        (
            Edit(
                "bridge/exposition.py",
                "    if scale == 1:\n        return str(value)",
                "    if scale == 1:\n        return f'{value:g}'",
            ),
        ),
        (KILLS,),
    ),
    "keeps_what_failed": Exhibit(
        "after a failed commit the disk says what is true",
        (Edit(BOOKKEEPER, "        self.is_lost = True\n", "        self.is_lost = False\n"),),
        (NTH_STATEMENT,),
    ),
    "trusts_a_failed_sync": Exhibit(
        "nothing builds on what a failed sync may have lost",
        (Edit(STORE, "        if not self.settle():\n", "        if False:\n"),),
        ("tests/test_store.py::test_after_an_io_error_nothing_is_acknowledged_on_a_log_that_may_not_be_there",),
    ),
    "cuts_the_log_and_writes_no_new_one": Exhibit(
        "older pages that come back with a log that was only cut hide nothing",
        (Edit(STORE, "        self.touch()\n        return not is_busy", "        return not is_busy"),),
        ("tests/rigs/test_disk.py::test_no_call_that_fails_makes_a_false_acknowledgement",),
    ),
    "believes_a_log_that_was_left": Exhibit(
        "what a killed process left unsynced is brought to the disk before a repeat of it is acknowledged",
        (Edit(BOOKKEEPER, "                self._store.settle()\n", "                pass\n"),),
        ("tests/test_store.py::test_what_a_killed_process_left_is_brought_to_the_disk",),
    ),
    "never_gives_up": Exhibit(
        "a disk that fails again and again ends the process",
        (Edit(LEDGER, "if len(self._failures) >= MAX_FAILURES:", "if False:"),),
        ("tests/test_store.py::test_a_disk_that_fails_three_times_in_a_minute_is_given_up_and_a_full_one_never",),
    ),
    "gives_up_on_a_full_disk": Exhibit(
        "a full disk heals by itself",
        (Edit(LEDGER, "        if not error.disk_full:\n            now", "        if True:\n            now"),),
        ("tests/test_store.py::test_a_disk_that_fails_three_times_in_a_minute_is_given_up_and_a_full_one_never",),
    ),
    "starts_empty": Exhibit(
        "a lost database is no silent beginning",
        (Edit(STORE, "is_missed = (directory / SERVED).exists() and not may_begin", "is_missed = False"),),
        (DAMAGE,),
    ),
    "restores_without_a_floor": Exhibit(
        "after a return to an older state nothing shows less",
        (Edit(LEDGER, "self.floors = Floors(mark)", "self.floors = Floors(None)"),),
        (DAMAGE,),
    ),
    "believes_changed_rows": Exhibit(
        "a value that a flipped bit has changed is not shown",
        (Edit("bridge/rows.py", "    if proof(row[:-1]) != row[-1]:\n", "    if False:\n"),),
        ("tests/test_served.py::test_a_changed_value_is_damage",),
    ),
    "another_database_s_log": Exhibit(
        "a WAL never meets another database",
        (
            Edit(
                "bridge/recovery.py",
                'for end in ("-wal", "-shm", "") if',
                'for end in ("",) if',
            ),
        ),
        ("tests/rigs/test_damage.py::test_the_log_of_a_damaged_database_goes_with_it",),
    ),
    "cursors_of_their_own": Exhibit(
        "what a transcript says and how far it is read are one transaction",
        (
            Edit(
                BOOKKEEPER,
                "        if request.transcript is not None:\n            self._usage.write_transcript(request.transcript)\n",
                "",
            ),
            Edit(
                BOOKKEEPER,
                "        books = self._books = _Books()\n        with",
                "        with self._store.transaction():\n"
                "            for request in group:\n"
                "                if request.transcript is not None:\n"
                "                    self._usage.write_transcript(request.transcript)\n"
                "        books = self._books = _Books()\n        with",
            ),
        ),
        (
            "tests/test_transcripts.py::test_a_disk_error_repeats_and_loses_nothing",
            "tests/test_transcripts.py::test_sigkill_while_files_grow_is_exact",
        ),
    ),
    "last_line_wins": Exhibit(
        "of several lines of one response the one with the highest output counts",
        (
            Edit(
                USAGE,
                "if is_repeat or _rank(candidate) <= _rank(known):",
                "if is_repeat:",
            ),
        ),
        (
            "tests/test_transcripts.py::test_an_older_copy_restored_counts_once",
            "tests/test_transcripts.py::test_a_growing_output_counts_once",
            "tests/test_join.py",
        ),
    ),
    "once_a_file": Exhibit(
        "a response counts once, in however many files it stands",
        (
            Edit(
                USAGE,
                "key = usage.message + usage.key[:8] if usage.message else usage.key\n",
                "key = usage.message + usage.key[:8] + usage.session.encode() if usage.message else usage.key\n",
            ),
        ),
        ("tests/test_transcripts.py::test_a_fork_of_a_session_counts_once",),
    ),
    "any_host": Exhibit(
        "a foreign Host is refused",
        (Edit(SERVER, "if host is not None and not self._is_our_host(host, protocol.local):", "if False:"),),
        ("tests/test_receiver.py",),
    ),
    "any_origin": Exhibit(
        "a web page of another origin is refused",
        (Edit(SERVER, 'for origin in request.headers.getall("Origin", [])', "for origin in ()"),),
        ("tests/test_receiver.py",),
    ),
    "truncated_gzip": Exhibit(
        "a shortened body is no whole one",
        (Edit("bridge/otlp/body.py", "        if not stream.eof:\n", "        if False:\n"),),
        ("tests/test_otlp.py",),
    ),
    "retry_after_zero": Exhibit(
        "a 503 names no time, so that the client tries for eight seconds",
        (
            Edit(
                SERVER,
                "        self.headers = dict(headers or {})",
                "        self.headers = {'Retry-After': '0', **(headers or {})}",
            ),
        ),
        ("tests/test_receiver.py::test_many_large_bodies_at_once_stay_in_bounds",),
    ),
    "one_address_family": Exhibit(
        "localhost is both loopback addresses",
        (
            Edit(
                "bridge/listeners.py",
                'wanted = [(socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")]',
                'wanted = [(socket.AF_INET, "127.0.0.1")]',
            ),
        ),
        ("tests/test_daemon.py::test_both_loopback_families",),
    ),
    "readable_by_all": Exhibit(
        "the state is for its owner alone",
        (Edit(STORE, "                path.chmod(0o600)\n", "                pass\n"),),
        ("tests/test_store.py::test_files_are_for_their_owner_alone",),
    ),
    "any_file_system": Exhibit(
        "a network file system is refused",
        (Edit(DAEMON, "        if not config.allow_network_fs:\n", "        if False:\n"),),
        ("tests/test_daemon.py::test_a_state_in_a_synchronised_folder_is_refused_unless_it_is_wanted",),
    ),
    "silent_refusals": Exhibit(
        "what is refused is told to its sender",
        (Edit(RECEIVER, "        rejected = len(receipt.refused)\n", "        rejected = 0\n"),),
        ("tests/test_receiver.py",),
    ),
    "sums_of_agents_too": Exhibit(
        "a span that sums up those below it counts no request again",
        (
            Edit(
                "bridge/usage_store.py",
                '            "select 1 from span as outer_, span as inner_ where outer_.usage = ?1 and inner_.parent = outer_.span"\n'
                '            " and inner_.trace = outer_.trace"\n',
                '            "select 1 where ?1 < 0"\n',
            ),
        ),
        ("tests/test_genai.py::test_each_request_of_a_trace_counts_once_in_any_order",),
    ),
    "both_instrumentations": Exhibit(
        "a response that two instrumentations tell of counts once",
        (
            Edit(
                "bridge/usage_store.py",
                "        response = row.request and place.trace + row.request\n",
                "        response = row.request and place.trace + row.request + place.span\n",
            ),
        ),
        ("tests/test_genai.py::test_each_request_of_a_trace_counts_once_in_any_order",),
    ),
    "histograms_too": Exhibit(
        "a histogram beside the counters that replace it counts nothing",
        (Edit(KNOWN, "repeats=genai.repeats(batch.points)", "repeats=frozenset()"),),
        ("tests/test_genai.py::test_a_histogram_beside_the_counters_that_replace_it_counts_nothing",),
    ),
    "both_names": Exhibit(
        "what a known tool also says under the names of GenAI counts once",
        (
            Edit(
                KNOWN,
                'if module is None or (module is genai and _is_repeated(metric.resource.get("service.name"))):',
                "if module is None:",
            ),
        ),
        ("tests/test_genai.py::test_tools_that_are_known_are_not_counted_again",),
    ),
    "cached_twice": Exhibit(
        "what was read from a cache is part of Gemini's input, and counts once",
        (Edit(GEMINI_LINES, "max(0, prompt - cached) + tool", "prompt + tool"),),
        ("tests/test_gemini.py::test_each_source_alone_and_all_together_say_the_same",),
    ),
    "every_writing": Exhibit(
        "a message that is written again, when its tools end or a chat is rewound, counts once",
        (
            Edit(
                GEMINI_LINES,
                '            digest(f"{self._file}\\0{name}"),\n',
                '            digest(f"{self._file}\\0{name}\\0{self._lines}"),\n',
            ),
        ),
        ("tests/test_gemini_lines.py::test_every_rule_holds_as_it_is_written",),
    ),
    "resumed_anew": Exhibit(
        "a chat that was resumed under another format is the same chat",
        (Edit(GEMINI_LINES, 'self._file = name.rpartition(".")[0]', "self._file = name"),),
        (
            "tests/test_gemini_lines.py::test_every_rule_holds_for_history",
            "tests/test_gemini_lines.py::test_every_rule_holds_as_it_is_written",
        ),
    ),
    "parts_of_one_name": Exhibit(
        "each part of a large body is known by a name of its own",
        (Edit(LEDGER, "body=name + at.to_bytes(4)", "body=name"),),
        ("tests/test_ledger_properties.py::test_what_is_missing_of_a_large_body_is_added_by_the_retry",),
    ),
    "nothing_there": Exhibit(
        "what no descriptor is left for is not taken for absent",
        (Edit("bridge/descriptors.py", "        if ran_out(error):\n", "        if False:\n"),),
        ("tests/test_transcripts.py::test_history_stays_history_and_news_news_when_descriptors_run_out",),
    ),
    "log_eats_all": Exhibit(
        "what room there is after a full disk goes to the database before the log",
        (Edit(BOOKKEEPER, "self._is_cramped = not self._store.make_room()", "self._is_cramped = False"),),
        ("tests/test_store.py::test_room_on_a_full_disk_goes_to_the_database_first",),
    ),
}

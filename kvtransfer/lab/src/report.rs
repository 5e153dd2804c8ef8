//! What the run gathers from the guest, and the table at its end.

use std::{
    fs::{self, File},
    io::Write as _,
    path::PathBuf,
};

use anyhow::{Context as _, Result};

use crate::{
    jobs::SELF_TEST,
    protocol::{Ended, Report},
};

/// How a job came out.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Outcome {
    /// It ran, and ended so after that many seconds.
    Ran(Ended, f64),
    /// It was not run, and why.
    Skipped(String),
    /// It was ordered and did not end.
    Lost,
}

/// The jobs of a run and their outcomes.
#[derive(Debug)]
pub(crate) struct Results {
    jobs: Vec<(String, Outcome)>,
    /// Where files of jobs go.
    outputs: PathBuf,
    has_files: bool,
}

impl Results {
    /// Of a run that begins; `jobs` in the order of the table, with what is known beforehand.
    pub(crate) fn new(jobs: Vec<(String, Outcome)>, outputs: PathBuf) -> Self {
        Self {
            jobs,
            outputs,
            has_files: false,
        }
    }

    /// Takes a report; the lines to show for it.
    pub(crate) fn take(&mut self, report: Report) -> Result<Option<String>> {
        match report {
            Report::Stage { name, seconds } => {
                return Ok(Some(format!("lab: {seconds:5.1} s  guest: {name}")));
            }
            Report::Started { job } => return Ok(Some(format!("lab: start {job}"))),
            Report::Output { job, text } => return Ok(Some(format!("{job} | {text}"))),
            Report::Job {
                job,
                ended,
                seconds,
            } => {
                let outcome = Outcome::Ran(ended, seconds);
                let line = format!("lab: {job}: {}", outcome.words());
                for (name, known) in &mut self.jobs {
                    if *name == job {
                        *known = outcome.clone();
                    }
                }
                return Ok(Some(line));
            }
            Report::File { job, name, bytes } => self.keep(&job, &name, &bytes)?,
            Report::Broken { .. } | Report::Done => {}
        }
        Ok(None)
    }

    /// Appends a piece of a job's file.
    fn keep(&mut self, job: &str, name: &str, bytes: &[u8]) -> Result<()> {
        // Only names of our own jobs become folders.
        if !self.jobs.iter().any(|(known, _)| known == job) {
            return Ok(());
        }
        let folder = self.outputs.join(job);
        fs::create_dir_all(&folder).with_context(|| format!("making {}", folder.display()))?;
        let path = folder.join(name);
        let mut file = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .with_context(|| format!("opening {}", path.display()))?;
        file.write_all(bytes)
            .with_context(|| format!("writing {}", path.display()))?;
        self.has_files = true;
        Ok(())
    }

    /// The table, and whether the run passed: something ran, all that ran passed, and nothing that was asked for by
    /// name is missing.
    pub(crate) fn table(&self, asked: &[String]) -> (String, bool) {
        let width = self
            .jobs
            .iter()
            .map(|(name, _)| name.len())
            .max()
            .unwrap_or(0);
        let mut table = String::new();
        let mut counts = [0_usize; 3];
        let mut is_missing = false;
        for (name, outcome) in &self.jobs {
            let which = match outcome {
                Outcome::Ran(Ended::Exited(0), _) => 0,
                Outcome::Ran(..) | Outcome::Lost => 1,
                Outcome::Skipped(_) => 2,
            };
            counts[which] += 1;
            is_missing |= which == 2 && asked.contains(name);
            table.push_str(&format!("  {name:width$}  {}\n", outcome.words()));
        }
        if self.has_files {
            table.push_str(&format!("files of jobs: {}\n", self.outputs.display()));
        }
        let words = self.kinds().into_iter().map(|(kind, is_ok)| {
            let word = if is_ok { "ok" } else { "BROKEN" };
            format!("{kind} {word}")
        });
        let words: Vec<String> = words.collect();
        if !words.is_empty() {
            table.push_str(&format!("lab: {}\n", words.join(", ")));
        }
        let [passed, failed, skipped] = counts;
        if is_missing {
            table.push_str("failed: a job that was asked for did not run\n");
        }
        if passed + failed == 0 {
            table.push_str("failed: nothing ran\n");
        }
        table.push_str(&format!(
            "{passed} passed, {failed} failed, {skipped} skipped"
        ));
        (table, passed > 0 && failed == 0 && !is_missing)
    }

    /// Whether the self-test of each kind of device passed, of the kinds whose self-test was run as a whole.
    fn kinds(&self) -> Vec<(&'static str, bool)> {
        let mut kinds = Vec::new();
        for kind in ["siw", "rxe"] {
            let tests: Vec<_> = SELF_TEST
                .iter()
                .filter(|name| name.ends_with(kind))
                .collect();
            let of_kind = |(name, _): &&(String, Outcome)| tests.iter().any(|test| *test == name);
            let ran: Vec<_> = self.jobs.iter().filter(of_kind).collect();
            if ran.len() == tests.len() {
                let is_ok =
                    |outcome: &Outcome| matches!(outcome, Outcome::Ran(Ended::Exited(0), _));
                kinds.push((kind, ran.iter().all(|(_, outcome)| is_ok(outcome))));
            }
        }
        kinds
    }
}

impl Outcome {
    fn words(&self) -> String {
        match self {
            Self::Ran(Ended::Exited(0), seconds) => format!("ok       {seconds:6.1} s"),
            Self::Ran(Ended::Exited(code), seconds) => {
                format!("FAILED   {seconds:6.1} s  exit code {code}")
            }
            Self::Ran(Ended::Killed(signal), seconds) => {
                format!("FAILED   {seconds:6.1} s  signal {signal}")
            }
            Self::Ran(Ended::TimedOut, seconds) => {
                format!("FAILED   {seconds:6.1} s  over its limit, killed")
            }
            Self::Skipped(why) => format!("skipped            {why}"),
            Self::Lost => "FAILED             the machine ended before it".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn results(jobs: &[(&str, Outcome)]) -> Results {
        let jobs = jobs
            .iter()
            .map(|(name, outcome)| ((*name).to_owned(), outcome.clone()));
        Results::new(jobs.collect(), PathBuf::from("/nowhere"))
    }

    fn passed(code: i32) -> Outcome {
        Outcome::Ran(Ended::Exited(code), 1.0)
    }

    #[test]
    fn a_run_passes_only_if_something_ran_and_all_passed() {
        let why = || Outcome::Skipped("no test".to_owned());
        let cases: [(&[(&str, Outcome)], bool); 6] = [
            (&[], false),
            (&[("a", why())], false),
            (&[("a", passed(0)), ("b", why())], true),
            (&[("a", passed(0)), ("b", passed(1))], false),
            (&[("a", passed(0)), ("b", Outcome::Lost)], false),
            (
                &[("a", passed(0)), ("b", Outcome::Ran(Ended::TimedOut, 9.0))],
                false,
            ),
        ];
        for (jobs, expected) in cases {
            let (table, is_passed) = results(jobs).table(&[]);
            assert_eq!(is_passed, expected, "{table}");
        }
        let skipped = results(&[("a", passed(0)), ("b", why())]);
        let (table, is_passed) = skipped.table(&["b".to_owned()]);
        assert!(!is_passed, "a job asked for by name did not run: {table}");
        assert!(table.ends_with("1 passed, 0 failed, 1 skipped"), "{table}");
    }

    #[test]
    fn the_self_test_says_which_kind_of_device_works() {
        let with = |name: &str| {
            let code = i32::from(name == "perftest-rxe");
            (name.to_owned(), passed(code))
        };
        let mut results = Results::new(SELF_TEST.map(with).to_vec(), PathBuf::from("/nowhere"));
        assert_eq!(results.kinds(), [("siw", true), ("rxe", false)]);
        results.jobs.remove(0);
        assert_eq!(
            results.kinds(),
            [("rxe", false)],
            "half a self-test says nothing"
        );
    }

    #[test]
    fn a_job_is_lost_until_it_reports_its_end() {
        let mut results = results(&[("a", Outcome::Lost)]);
        assert!(!results.table(&[]).1);
        let report = Report::Job {
            job: "a".to_owned(),
            ended: Ended::Exited(0),
            seconds: 1.0,
        };
        results.take(report).expect("nothing to write");
        assert!(results.table(&[]).1);
    }
}

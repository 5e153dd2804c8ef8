//! What the threads of a job are doing, for a job that does not end: its own waits, or the kernel's.

use std::{fmt, fs, path::Path, process::Command};

/// Threads that are described; an engine has some ten.
const THREADS_MAX: usize = 64;
/// Frames of a kernel stack that are told; the wait is at the top.
const FRAMES_MAX: usize = 12;
/// Lines of the kernel's log that are told, from its end.
const LOG_LINES_MAX: usize = 40;

/// One thread of a job, as `/proc` shows it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Thread {
    process: u32,
    thread: u32,
    name: String,
    /// `D` waits in the kernel and takes no signal, `Z` has ended and waits for the other threads of its process.
    state: char,
    /// Processor time so far, in user space and in the kernel, in hundredths of a second.
    ticks: (u64, u64),
    /// The system call it is in, and where in the kernel.
    call: String,
    stack: Vec<String>,
}

impl fmt::Display for Thread {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (user, kernel) = self.ticks;
        write!(
            f,
            "process {} thread {} ({}): state {}, {user} + {kernel} ticks, call {}",
            self.process, self.thread, self.name, self.state, self.call
        )?;
        for frame in &self.stack {
            write!(f, "\n    {frame}")?;
        }
        Ok(())
    }
}

/// The threads of a process group. A process that only waits for its parent to hear of its end is left out.
pub(super) fn threads(group: u32) -> Vec<Thread> {
    let mut threads = Vec::new();
    for process in numbers_in(Path::new("/proc")) {
        let tasks = Path::new("/proc").join(process.to_string()).join("task");
        let before = threads.len();
        for thread in numbers_in(&tasks) {
            let task = tasks.join(thread.to_string());
            let read = |name: &str| fs::read_to_string(task.join(name)).unwrap_or_default();
            let Some((name, state, ticks)) = parse_stat(&read("stat"), group) else {
                continue;
            };
            let stack = read("stack");
            let frames = stack.lines().filter_map(|line| line.split(' ').nth(1));
            threads.push(Thread {
                process,
                thread,
                name,
                state,
                ticks,
                call: read("syscall").trim().to_owned(),
                stack: frames.take(FRAMES_MAX).map(str::to_owned).collect(),
            });
            if threads.len() == THREADS_MAX {
                return threads;
            }
        }
        if threads[before..].iter().all(|thread| thread.state == 'Z') {
            threads.truncate(before);
        }
    }
    threads
}

/// The end of the kernel's log.
pub(super) fn kernel_log() -> Vec<String> {
    let output = Command::new("dmesg").output();
    let text = output.map(|output| String::from_utf8_lossy(&output.stdout).into_owned());
    let text = text.unwrap_or_else(|error| format!("dmesg does not start: {error}"));
    let lines: Vec<&str> = text.lines().collect();
    let skipped = lines.len().saturating_sub(LOG_LINES_MAX);
    lines[skipped..]
        .iter()
        .map(|line| (*line).to_owned())
        .collect()
}

fn numbers_in(folder: &Path) -> Vec<u32> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let names = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
    names.collect()
}

/// A thread's name, state and processor time, if it is of the group.
fn parse_stat(stat: &str, group: u32) -> Option<(String, char, (u64, u64))> {
    // The name may hold spaces and parentheses, what follows it does not.
    let (head, tail) = stat.rsplit_once(") ")?;
    let (_, name) = head.split_once('(')?;
    let words: Vec<&str> = tail.split(' ').collect();
    let is_ours = words.get(2)?.parse() == Ok(group);
    let (user, kernel) = (words.get(11)?.parse().ok()?, words.get(12)?.parse().ok()?);
    is_ours.then_some((
        name.to_owned(),
        words.first()?.chars().next()?,
        (user, kernel),
    ))
}

#[cfg(test)]
mod tests {
    use std::{os::unix::process::CommandExt as _, process::Stdio};

    use super::*;

    #[test]
    fn a_name_with_parentheses_does_not_hide_the_rest() {
        let stat = "12 (a) R (b) D 1 77 77 0 -1 64 0 0 0 0 5 6 0 0 20 0 1 0 0";
        let parsed = parse_stat(stat, 77).expect("of the group");
        assert_eq!(parsed, ("a) R (b".to_owned(), 'D', (5, 6)));
        assert_eq!(parse_stat(stat, 76), None);
        assert_eq!(parse_stat("12 (a) D 1 77", 77), None);
        assert_eq!(parse_stat("", 77), None);
    }

    #[test]
    fn a_sleeping_process_is_found_by_its_group_until_it_is_gone() {
        let mut child = Command::new("sleep")
            .arg("600")
            .process_group(0)
            .stdin(Stdio::null())
            .spawn()
            .expect("sleep starts");
        let group = child.id();
        let found = threads(group);
        child.kill().expect("ours");
        child.wait().expect("it was started");
        assert_eq!(found.len(), 1, "{found:?}");
        assert_eq!((found[0].process, found[0].thread), (group, group));
        let text = found[0].to_string();
        assert!(text.contains("ticks, call "), "{text}");
        assert_eq!(threads(group), []);
    }
}

//! The memory that this process may use: what its control groups allow, or what the machine has.

use std::fs;
use std::path::Path;

/// Where control groups are mounted: of version 2, of version 1, and of version 2 beside version 1.
const MOUNTS: [(&str, &str); 3] = [
    ("/sys/fs/cgroup", "memory.max"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes"),
    ("/sys/fs/cgroup/unified", "memory.max"),
];

/// In bytes. [`usize::MAX`] if nothing can be read.
pub(super) fn available_memory() -> usize {
    let groups = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let limits = MOUNTS.iter().filter_map(|(mount, file)| {
        let group = own_group(&groups, file.ends_with(".max"))?;
        smallest_limit(Path::new(mount), group, file)
    });
    let machine = fs::read_to_string("/proc/meminfo").ok().and_then(|text| total(&text));
    limits.chain(machine).min().map_or(usize::MAX, |bytes| usize::try_from(bytes).unwrap_or(usize::MAX))
}

/// The path of the process's own group, of `/proc/self/cgroup`: lines of a number, controllers and a path
/// (`cgroups(7)`). In version 2 there is one group for all controllers.
fn own_group(groups: &str, is_version_2: bool) -> Option<&str> {
    groups.lines().find_map(|line| {
        let (_, rest) = line.split_once(':')?;
        let (controllers, path) = rest.split_once(':')?;
        let is_it = match is_version_2 {
            true => controllers.is_empty(),
            false => controllers.split(',').any(|controller| controller == "memory"),
        };
        is_it.then_some(path)
    })
}

/// The smallest limit of a group and its parents, each of which counts. In a container the path may be the
/// host's, which is not there: then the root of the mount is the container's group.
fn smallest_limit(mount: &Path, group: &str, file: &str) -> Option<u64> {
    let own = mount.join(group.trim_start_matches('/'));
    let groups = own.ancestors().take_while(|path| path.starts_with(mount));
    // `max` is no number.
    groups.filter_map(|group| fs::read_to_string(group.join(file)).ok()?.trim().parse().ok()).min()
}

/// The machine's memory, of `/proc/meminfo`.
fn total(meminfo: &str) -> Option<u64> {
    let kilobytes = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    kilobytes.split_whitespace().next()?.parse::<u64>().ok().map(|kilobytes| kilobytes * 1_024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_group_is_found_in_both_versions() {
        let version_1 = "5:cpu,cpuacct:/a\n4:memory:/docker/b\n0::/\n";
        assert_eq!((own_group(version_1, false), own_group(version_1, true)), (Some("/docker/b"), Some("/")));
        let version_2 = "0::/system.slice/mini-lb.service\n";
        assert_eq!(own_group(version_2, true), Some("/system.slice/mini-lb.service"));
        assert_eq!(own_group(version_2, false), None);
    }

    #[test]
    fn the_smallest_limit_of_a_group_and_its_parents_counts() {
        let mount = std::env::temp_dir().join(format!("mini-lb-cgroup-{}", std::process::id()));
        let own = mount.join("a/b/c");
        fs::create_dir_all(&own).unwrap();
        let limit = |group: &str| smallest_limit(&mount, group, "memory.max");
        assert_eq!(limit("/a/b/c"), None);
        fs::write(own.join("memory.max"), "max\n").unwrap();
        assert_eq!(limit("/a/b/c"), None);
        fs::write(mount.join("a/memory.max"), "2000\n").unwrap();
        fs::write(mount.join("a/b/memory.max"), "3000\n").unwrap();
        assert_eq!((limit("/a/b/c"), limit("/a/b"), limit("/")), (Some(2_000), Some(2_000), None));
        // A path of the host's.
        fs::write(mount.join("memory.max"), "1000\n").unwrap();
        assert_eq!(limit("/kubepods/pod1/2"), Some(1_000));
        fs::remove_dir_all(&mount).unwrap();
    }

    #[test]
    fn this_machine_has_memory() {
        assert_eq!(total("MemTotal:       24684096 kB\nMemFree: 1 kB\n"), Some(24_684_096 << 10));
        assert!((1 << 20..1 << 50).contains(&available_memory()), "{}", available_memory());
    }
}

//! What the path of a cgroup tells: the container that a process runs in, and the unit that systemd runs it in.
//!
//! Nobody but the manager of cgroups names them, so a process cannot choose these; but a path is only a name: whoever may
//! make cgroups may call one as if Docker had.

use serde::Serialize;

/// A container, as its cgroup is named.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Container {
    /// Who runs it: `docker`, `podman`, `containerd`, `cri-o`, `lxc`, `nspawn`, `libvirt`, or `kubernetes` where only the
    /// pod is known.
    pub runtime: &'static str,
    /// Its id, or its name with those that have names.
    pub id: String,
    /// The unique id of its pod, under Kubernetes.
    pub pod: Option<String>,
}

/// Prefixes of scopes that runtimes make under systemd: `PREFIX-ID.scope`.
const SCOPES: [(&str, &str); 6] = [
    ("docker-", "docker"),
    ("libpod-", "podman"),
    ("cri-containerd-", "containerd"),
    ("nerdctl-", "containerd"),
    ("crio-", "cri-o"),
    ("lxc-", "lxc"),
];

/// Scopes of machines, whose names are their own.
const MACHINE: &str = "machine-";
/// Where systemd-nspawn itself runs, beside the machine's processes.
const SUPERVISOR: &str = "supervisor";

impl Container {
    /// Reads the path of a cgroup: the containers that it enters, outermost first. A container in a container is two.
    #[must_use]
    pub fn all(cgroup: &str) -> Vec<Self> {
        let parts: Vec<&str> = cgroup.split('/').filter(|part| !part.is_empty()).collect();
        let mut found: Vec<Self> = Vec::new();
        let mut pod: Option<String> = None;
        for (at, part) in parts.iter().enumerate() {
            if let Some(uid) = pod_of(part) {
                pod = Some(uid);
            } else if let Some((runtime, id)) = named(&parts, at, pod.is_some()) {
                found.push(Self { runtime, id, pod: pod.take() });
            }
        }
        // A pod's own processes, or those of a runtime that is not known here.
        found.extend(pod.map(|pod| Self { runtime: "kubernetes", id: pod.clone(), pod: Some(pod) }));
        found
    }
}

/// The container that the path enters at this folder.
fn named(parts: &[&str], at: usize, in_pod: bool) -> Option<(&'static str, String)> {
    let part = parts[at];
    let before = at.checked_sub(1).map_or("", |at| parts[at]);
    let after = parts.get(at + 1).copied().unwrap_or("");
    if let Some(scope) = part.strip_suffix(".scope") {
        // What watches a container from outside, as libpod-conmon-ID, has no id here.
        let of = |(prefix, runtime): &(&str, &'static str)| {
            scope.strip_prefix(*prefix).filter(|id| is_id(id)).map(|id| (*runtime, id.to_owned()))
        };
        if let Some(found) = SCOPES.iter().find_map(of) {
            return Some(found);
        }
        let name = unescaped(scope.strip_prefix(MACHINE)?);
        return match (is_libvirt(&name), after) {
            (true, _) => Some(("libvirt", name)),
            (false, SUPERVISOR) => None,
            (false, _) => Some(("nspawn", name)),
        };
    }
    if let Some(name) = part.strip_suffix(".service").and_then(|name| name.strip_prefix("systemd-nspawn@")) {
        return (after != SUPERVISOR).then(|| ("nspawn", unescaped(name)));
    }
    // LXC: lxc/NAME, lxc.payload/NAME or lxc.payload.NAME; its monitors run outside.
    if let Some(name) = part.strip_prefix("lxc.payload.").filter(|name| !name.is_empty()) {
        return Some(("lxc", name.to_owned()));
    }
    match before {
        "lxc" | "lxc.payload" => Some(("lxc", part.to_owned())),
        "docker" if is_id(part) => Some(("docker", part.to_owned())),
        "libpod_parent" => part.strip_prefix("libpod-").filter(|id| is_id(id)).map(|id| ("podman", id.to_owned())),
        // containerd without systemd, in a pod: kubepods/besteffort/podUID/ID; who runs it is not told.
        _ if in_pod && pod_of(before).is_some() => match part.strip_prefix("crio-") {
            Some(id) if is_id(id) => Some(("cri-o", id.to_owned())),
            _ if is_id(part) => Some(("containerd", part.to_owned())),
            _ => None,
        },
        _ => None,
    }
}

/// libvirt names its machines by driver and number: `qemu-3-name`, `lxc-7-name`.
fn is_libvirt(name: &str) -> bool {
    let mut parts = name.splitn(3, '-');
    let (driver, number) = (parts.next(), parts.next().unwrap_or(""));
    matches!(driver, Some("qemu" | "lxc")) && !number.is_empty() && number.bytes().all(|byte| byte.is_ascii_digit())
}

/// 64 hexadecimal digits, as all runtimes give; some tools shorten them to 12.
fn is_id(text: &str) -> bool {
    text.len() >= 12 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

/// The pod's id from `kubepods-burstable-podUID.slice` or `podUID`. systemd's names have `_` for `-`.
fn pod_of(part: &str) -> Option<String> {
    let uid = match part.strip_suffix(".slice") {
        Some(slice) if slice.contains("kubepods") => slice.rsplit_once("-pod")?.1.replace('_', "-"),
        Some(_) => return None,
        None => part.strip_prefix("pod")?.to_owned(),
    };
    // Static pods have a hash of their file instead of a UUID.
    let is_uid = uid.len() >= 32 && uid.bytes().all(|byte| byte.is_ascii_hexdigit() || byte == b'-');
    is_uid.then_some(uid)
}

/// systemd's way to put any character into a name: `\x2d` is a dash.
fn unescaped(name: &str) -> String {
    let mut bytes = Vec::with_capacity(name.len());
    let mut rest = name.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        let hex = after.strip_prefix(b"x").and_then(|after| after.get(..2));
        let value = hex.and_then(|two| u8::from_str_radix(std::str::from_utf8(two).ok()?, 16).ok());
        match value.filter(|_| first == b'\\') {
            Some(byte) => {
                bytes.push(byte);
                rest = &after[3..];
            }
            None => {
                bytes.push(first);
                rest = after;
            }
        }
    }
    String::from_utf8_lossy(&bytes).into_owned()
}

/// The units of systemd in the path of a cgroup, outermost first: slices, then a service or a scope, and those of a user's
/// own manager below it.
#[must_use]
pub fn units(cgroup: &str) -> Vec<String> {
    let is_unit = |part: &&str| {
        let kinds = [".service", ".scope", ".slice", ".socket", ".mount", ".swap"];
        kinds.iter().any(|kind| part.len() > kind.len() && part.ends_with(kind))
    };
    cgroup.split('/').filter(is_unit).map(ToOwned::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "4f1c0a9b7e2d4f1c0a9b7e2d4f1c0a9b7e2d4f1c0a9b7e2d4f1c0a9b7e2d4f1c";
    const POD: &str = "7f0a1c2e-3b4d-4e5f-8a9b-0c1d2e3f4a5b";

    /// Runtime, id and pod of the containers of a path, in which `ID` and `POD` stand for some.
    fn of(path: &str) -> Vec<(&'static str, String, bool)> {
        let path = path.replace("POD_", &POD.replace('-', "_")).replace("POD", POD).replace("ID", ID);
        let found = Container::all(&path);
        for pod in found.iter().filter_map(|it| it.pod.as_deref()) {
            assert_eq!(pod, POD);
        }
        let short = |it: Container| (it.runtime, it.id.replace(ID, "ID").replace(POD, "POD"), it.pod.is_some());
        found.into_iter().map(short).collect()
    }

    fn one(runtime: &'static str, id: &str, pod: bool) -> Vec<(&'static str, String, bool)> {
        vec![(runtime, id.to_owned(), pod)]
    }

    #[test]
    fn docker_and_podman() {
        assert_eq!(of("/docker/ID"), one("docker", "ID", false));
        assert_eq!(of("/system.slice/docker-ID.scope"), one("docker", "ID", false));
        assert_eq!(of("/system.slice/docker-ID.scope/init.scope"), one("docker", "ID", false));
        assert_eq!(
            of("/user.slice/user-1000.slice/user@1000.service/user.slice/docker-ID.scope"),
            one("docker", "ID", false)
        );
        assert_eq!(of("/machine.slice/libpod-ID.scope/container"), one("podman", "ID", false));
        assert_eq!(of("/machine.slice/machine-libpod_pod_ID.slice/libpod-ID.scope"), one("podman", "ID", false));
        assert_eq!(of("/libpod_parent/libpod-ID"), one("podman", "ID", false));
        assert_eq!(
            of("/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-ID.scope/container"),
            one("podman", "ID", false)
        );
        assert_eq!(of("/system.slice/nerdctl-ID.scope"), one("containerd", "ID", false));
    }

    #[test]
    fn what_stands_beside_a_container_is_in_none() {
        for path in [
            "/",
            "",
            "/system.slice/docker.service",
            "/system.slice/containerd.service",
            "/machine.slice/libpod-conmon-ID.scope",
            "/kubepods.slice/kubepods-burstable.slice",
            "/kubepods/besteffort",
            "/lxc.monitor.web",
            "/lxc",
            "/machine.slice",
            "/machine.slice/systemd-nspawn@web.service/supervisor",
            "/machine.slice/machine-web.scope/supervisor",
            "/docker/buildx",
            "/podium/x",
            "/user.slice/user-1000.slice/session-3.scope",
        ] {
            assert_eq!(of(path), [], "{path}");
        }
    }

    #[test]
    fn pods() {
        let slices = "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podPOD_.slice";
        assert_eq!(of(&format!("{slices}/cri-containerd-ID.scope")), one("containerd", "ID", true));
        assert_eq!(of(&format!("{slices}/crio-ID.scope/container")), one("cri-o", "ID", true));
        assert_eq!(of(&format!("{slices}/docker-ID.scope")), one("docker", "ID", true));
        assert_eq!(of("/kubepods.slice/kubepods-podPOD_.slice/crio-ID.scope"), one("cri-o", "ID", true));
        assert_eq!(of("/kubepods/besteffort/podPOD/ID"), one("containerd", "ID", true));
        assert_eq!(of("/kubepods/podPOD/crio-ID"), one("cri-o", "ID", true));
        assert_eq!(of(slices), one("kubernetes", "POD", true));
        assert_eq!(of(&format!("{slices}/crio-conmon-ID.scope")), one("kubernetes", "POD", true));
        // A static pod has a hash of 32 digits.
        let statics = Container::all(&format!("/kubepods/burstable/pod{}/{ID}", "0123456789abcdef".repeat(2)));
        assert_eq!(statics[0].pod.as_deref(), Some("0123456789abcdef0123456789abcdef"));
    }

    #[test]
    fn machines_and_lxc() {
        assert_eq!(of("/machine.slice/systemd-nspawn@my\\x2dbox.service/payload/a"), one("nspawn", "my-box", false));
        assert_eq!(of("/machine.slice/machine-my\\x2dbox.scope/payload"), one("nspawn", "my-box", false));
        assert_eq!(
            of("/machine.slice/machine-qemu\\x2d3\\x2dweb\\x2d1.scope/libvirt/emulator"),
            one("libvirt", "qemu-3-web-1", false)
        );
        for path in ["/lxc/web", "/lxc.payload/web/system.slice/x.service", "/lxc.payload.web", "/x/lxc.payload.web/y"]
        {
            assert_eq!(of(path), one("lxc", "web", false), "{path}");
        }
    }

    #[test]
    fn a_container_in_a_container_is_both() {
        let found = of("/docker/ID/kubelet/kubepods/burstable/podPOD/ID");
        assert_eq!(found, [("docker", "ID".to_owned(), false), ("containerd", "ID".to_owned(), true)]);
        let found = of("/lxc.payload.web/docker/ID");
        assert_eq!(found, [("lxc", "web".to_owned(), false), ("docker", "ID".to_owned(), false)]);
    }

    #[test]
    fn names_that_end_in_the_middle_of_an_escape() {
        for (name, plain) in
            [("a\\", "a\\"), ("a\\x2", "a\\x2"), ("\\xzz", "\\xzz"), ("\\x2d\\x2d", "--"), ("\\xff", "\u{fffd}")]
        {
            assert_eq!(unescaped(name), plain);
        }
    }

    #[test]
    fn units_of_a_path() {
        assert_eq!(units("/system.slice/nginx.service"), ["system.slice", "nginx.service"]);
        assert_eq!(
            units("/user.slice/user-1000.slice/user@1000.service/app.slice/app-firefox@1.service/x"),
            ["user.slice", "user-1000.slice", "user@1000.service", "app.slice", "app-firefox@1.service"]
        );
        assert_eq!(units("/.service/docker"), Vec::<String>::new());
    }
}

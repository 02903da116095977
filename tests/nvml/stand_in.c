/* Stands in for NVIDIA's libnvidia-ml: answers what a script says, with the structures of nvml.h (API 13).
 *
 * A line of the script is FUNCTION DEVICE VALUE..., for example
 *
 *     nvmlDeviceGetPowerUsage 0 125000
 *     nvmlDeviceGetPowerUsage 1 error 15
 *     nvmlDeviceGetComputeRunningProcesses_v3 0 4242:1073741824 4343:none
 *     lost 1 5
 *
 * DEVICE is a number, or - where a function has none. What the script does not say is not supported, except
 * for what only does something, which succeeds. "lost 1 5": from the sixth call on, device 1 is off the bus.
 * The script is given by stand_in_script(), or lies in the file that KVSCOPE_STAND_IN names, which is then
 * read again whenever NVML is started.
 */

#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum {
    SUCCESS = 0,
    UNINITIALIZED = 1,
    INVALID_ARGUMENT = 2,
    NOT_SUPPORTED = 3,
    NOT_FOUND = 6,
    INSUFFICIENT_SIZE = 7,
    TIMEOUT = 10,
    GPU_IS_LOST = 15,
    LIB_RM_VERSION_MISMATCH = 18,
    ARGUMENT_VERSION_MISMATCH = 25,
    UNKNOWN = 999,
};

typedef int result;
typedef struct handle *device;
typedef struct events *event_set;

typedef struct {
    unsigned long long total, free, used;
} memory_v1;

typedef struct {
    unsigned int version;
    unsigned long long total, reserved, free, used;
} memory_v2;

typedef struct {
    unsigned int pid;
    unsigned long long used_gpu_memory;
    unsigned int gpu_instance_id, compute_instance_id;
} process_info;

typedef struct {
    char bus_id_legacy[16];
    unsigned int domain, bus, device, pci_device_id, pci_subsystem_id;
    char bus_id[32];
} pci_info;

typedef struct {
    unsigned int gpu, memory;
} utilization;

typedef struct {
    unsigned int version, sensor;
    int temperature;
} temperature_v1;

typedef struct {
    device device;
    unsigned long long type, data;
    unsigned int gpu_instance_id, compute_instance_id;
} event_data;

_Static_assert(sizeof(memory_v1) == 24, "nvmlMemory_t");
_Static_assert(sizeof(memory_v2) == 40 && offsetof(memory_v2, reserved) == 16, "nvmlMemory_v2_t");
_Static_assert(sizeof(process_info) == 24 && offsetof(process_info, used_gpu_memory) == 8, "nvmlProcessInfo_t");
_Static_assert(sizeof(pci_info) == 68 && offsetof(pci_info, bus_id) == 36, "nvmlPciInfo_t");
_Static_assert(sizeof(temperature_v1) == 12, "nvmlTemperature_v1_t");
_Static_assert(sizeof(event_data) == 32 && offsetof(event_data, gpu_instance_id) == 24, "nvmlEventData_t");

#define VERSION(type, number) ((unsigned int)(sizeof(type) | (number) << 24))

/* --- the script --- */

typedef struct {
    char function[56];
    int device;
    char value[240];
} line;

enum { LINES = 2048, DEVICES = 256, SETS = 4096 };

static line lines[LINES];
static size_t line_count;
static long calls_left[DEVICES];
static int events_taken[DEVICES];
static char loaded_version[240];

static int by_name(const void *left, const void *right)
{
    const line *a = left, *b = right;
    int order = strcmp(a->function, b->function);
    return order ? order : a->device - b->device;
}

static const char *find(const char *function, int number)
{
    line wanted = {.device = number};
    strncpy(wanted.function, function, sizeof wanted.function - 1);
    const line *found = bsearch(&wanted, lines, line_count, sizeof *lines, by_name);
    return found ? found->value : NULL;
}

/* Take a script instead of the one before. Returns how many lines it has, -1 where one cannot be read. */
int stand_in_script(const char *text)
{
    line_count = 0;
    for (int number = 0; number < DEVICES; number++) {
        calls_left[number] = -1;
        events_taken[number] = 0;
    }
    for (const char *start = text; *start;) {
        const char *end = strchr(start, '\n');
        size_t length = end ? (size_t)(end - start) : strlen(start);
        char one[320], number[16];
        if (length) {
            if (length >= sizeof one || line_count == LINES)
                return -1;
            memcpy(one, start, length);
            one[length] = '\0';
            line *into = &lines[line_count];
            memset(into, 0, sizeof *into);
            if (sscanf(one, "%55s %15s %239[^\n]", into->function, number, into->value) < 2)
                return -1;
            into->device = strcmp(number, "-") ? atoi(number) : -1;
            if (into->device < -1 || into->device >= DEVICES)
                return -1;
            if (!strcmp(into->function, "lost"))
                calls_left[into->device] = atol(into->value);
            else
                line_count++;
        }
        start += length + (end != NULL);
    }
    qsort(lines, line_count, sizeof *lines, by_name);
    return (int)line_count;
}

static void read_file(void)
{
    const char *path = getenv("KVSCOPE_STAND_IN");
    FILE *file = path ? fopen(path, "r") : NULL;
    static char text[65536];
    if (!file)
        return;
    text[fread(text, 1, sizeof text - 1, file)] = '\0';
    fclose(file);
    stand_in_script(text);
}

static const char *present_version(void)
{
    const char *value = find("nvmlSystemGetDriverVersion", -1);
    return value ? value : "";
}

__attribute__((constructor)) static void loaded(void)
{
    stand_in_script("");
    read_file();
    strcpy(loaded_version, present_version());
}

/* --- starting, handles --- */

static int started, starts;
static unsigned int generation;
static int open_sets;
static int set_device[SETS];
static int sets;

/* How often NVML was started, how often it is now, and how many event sets are open. */
int stand_in_starts(void) { return starts; }
int stand_in_started(void) { return started; }
int stand_in_open_sets(void) { return open_sets; }

static result error_in(const char *value)
{
    return value && !strncmp(value, "error ", 6) ? atoi(value + 6) : SUCCESS;
}

static device handle_of(int number)
{
    return (device)((uintptr_t)(generation << 16) | (uintptr_t)(number + 1));
}

static int number_of(device device)
{
    uintptr_t handle = (uintptr_t)device;
    int number = (int)(handle & 0xffff) - 1;
    return handle >> 16 == generation && number >= 0 && number < DEVICES ? number : -1;
}

/* Say what a function answers of a device. */
static result answer(const char *function, device device, const char **value)
{
    int number = number_of(device);
    if (!started)
        return UNINITIALIZED;
    if (number < 0)
        return INVALID_ARGUMENT;
    if (calls_left[number] == 0)
        return GPU_IS_LOST;
    if (calls_left[number] > 0)
        calls_left[number]--;
    *value = find(function, number);
    return *value ? error_in(*value) : NOT_SUPPORTED;
}

/* The number at that place of a list; - stands for none. */
static result nth(const char *value, unsigned int place, unsigned long long *into)
{
    char word[32];
    int used;
    while (sscanf(value, "%31s%n", word, &used) == 1) {
        if (place-- == 0) {
            *into = strtoull(word, NULL, 0);
            return strcmp(word, "-") ? SUCCESS : NOT_SUPPORTED;
        }
        value += used;
    }
    return NOT_SUPPORTED;
}

static result number(const char *function, device device, unsigned int place, unsigned long long *into)
{
    const char *value;
    result result = answer(function, device, &value);
    return result ? result : nth(value, place, into);
}

static result text(const char *function, device device, char *into, unsigned int length)
{
    const char *value;
    result result = answer(function, device, &value);
    if (result)
        return result;
    if (strlen(value) >= length)
        return INSUFFICIENT_SIZE;
    strcpy(into, value);
    return SUCCESS;
}

static result count(const char *function, device device, unsigned int place, unsigned int *into)
{
    unsigned long long value;
    result result = number(function, device, place, &value);
    if (!result)
        *into = (unsigned int)value;
    return result;
}

result nvmlInitWithFlags(unsigned int flags)
{
    (void)flags;
    read_file();
    starts++;
    result result = error_in(find("nvmlInitWithFlags", -1));
    if (result)
        return result;
    if (strcmp(loaded_version, "") && strcmp(loaded_version, present_version()))
        return LIB_RM_VERSION_MISMATCH;
    started++;
    return SUCCESS;
}

result nvmlShutdown(void)
{
    if (!started)
        return UNINITIALIZED;
    result result = error_in(find("nvmlShutdown", -1));
    if (result)
        return result;
    if (--started == 0)
        generation = (generation + 1) & 0xffff;
    return SUCCESS;
}

const char *nvmlErrorString(result code)
{
    static char told[32];
    snprintf(told, sizeof told, "Error %d", code);
    return told;
}

result nvmlSystemGetDriverVersion(char *into, unsigned int length)
{
    const char *value = find("nvmlSystemGetDriverVersion", -1);
    if (!started)
        return UNINITIALIZED;
    if (!value)
        return NOT_SUPPORTED;
    if (error_in(value))
        return error_in(value);
    if (strlen(value) >= length)
        return INSUFFICIENT_SIZE;
    strcpy(into, value);
    return SUCCESS;
}

result nvmlDeviceGetCount_v2(unsigned int *into)
{
    const char *value = find("nvmlDeviceGetCount_v2", -1);
    if (!started)
        return UNINITIALIZED;
    if (error_in(value))
        return error_in(value);
    *into = value ? (unsigned int)atoi(value) : 0;
    return SUCCESS;
}

result nvmlDeviceGetHandleByIndex_v2(unsigned int index, device *into)
{
    unsigned int devices;
    result result = nvmlDeviceGetCount_v2(&devices);
    if (result)
        return result;
    if (index >= devices)
        return INVALID_ARGUMENT;
    if (calls_left[index] == 0)
        return GPU_IS_LOST;
    *into = handle_of((int)index);
    return error_in(find("nvmlDeviceGetHandleByIndex_v2", (int)index));
}

/* --- what a device tells --- */

#define COUNT(function)                                                                                              \
    result function(device device, unsigned int *into) { return count(#function, device, 0, into); }
#define LONG_COUNT(function)                                                                                         \
    result function(device device, unsigned long long *into) { return number(#function, device, 0, into); }
#define TEXT(function)                                                                                               \
    result function(device device, char *into, unsigned int length) { return text(#function, device, into, length); }
#define CHOICE(function)                                                                                             \
    result function(device device, unsigned int which, unsigned int *into)                                           \
    {                                                                                                                \
        return count(#function, device, which, into);                                                                \
    }

TEXT(nvmlDeviceGetUUID)
TEXT(nvmlDeviceGetName)
COUNT(nvmlDeviceGetPowerUsage)
COUNT(nvmlDeviceGetEnforcedPowerLimit)
LONG_COUNT(nvmlDeviceGetTotalEnergyConsumption)
LONG_COUNT(nvmlDeviceGetCurrentClocksThrottleReasons)
COUNT(nvmlDeviceGetMaxMigDeviceCount)
CHOICE(nvmlDeviceGetTemperature)
CHOICE(nvmlDeviceGetClockInfo)
CHOICE(nvmlDeviceGetPcieThroughput)

result nvmlDeviceGetPciInfo_v3(device device, pci_info *into)
{
    memset(into, 0, sizeof *into);
    return text("nvmlDeviceGetPciInfo_v3", device, into->bus_id, sizeof into->bus_id);
}

result nvmlDeviceGetMemoryInfo(device device, memory_v1 *into)
{
    const char *value;
    result result = answer("nvmlDeviceGetMemoryInfo", device, &value);
    if (!result && sscanf(value, "%llu %llu %llu", &into->total, &into->free, &into->used) != 3)
        return UNKNOWN;
    return result;
}

result nvmlDeviceGetUtilizationRates(device device, utilization *into)
{
    const char *value;
    result result = answer("nvmlDeviceGetUtilizationRates", device, &value);
    if (!result && sscanf(value, "%u %u", &into->gpu, &into->memory) != 2)
        return UNKNOWN;
    return result;
}

/* volatile corrected, volatile uncorrected, aggregate corrected, aggregate uncorrected */
result nvmlDeviceGetTotalEccErrors(device device, unsigned int error, unsigned int counter, unsigned long long *into)
{
    return number("nvmlDeviceGetTotalEccErrors", device, 2 * counter + error, into);
}

static result processes(const char *function, device device, unsigned int *room, process_info *into)
{
    const char *value;
    result result = answer(function, device, &value);
    if (result)
        return result;
    unsigned int listed = 0;
    char word[64];
    for (int used; sscanf(value, "%63s%n", word, &used) == 1; value += used, listed++) {
        char *size = strchr(word, ':');
        if (!size || listed >= *room || !into)
            continue;
        into[listed].pid = (unsigned int)strtoul(word, NULL, 10);
        into[listed].used_gpu_memory = strcmp(size + 1, "none") ? strtoull(size + 1, NULL, 10) : UINT64_MAX;
        into[listed].gpu_instance_id = into[listed].compute_instance_id = UINT32_MAX;
    }
    result = listed > *room ? INSUFFICIENT_SIZE : SUCCESS;
    *room = listed;
    return result;
}

#define PROCESSES(function)                                                                                          \
    result function(device device, unsigned int *room, process_info *into)                                           \
    {                                                                                                                \
        return processes(#function, device, room, into);                                                             \
    }

PROCESSES(nvmlDeviceGetComputeRunningProcesses_v2)
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v2)

#ifndef OLD_DRIVER /* before R510: none of these */

PROCESSES(nvmlDeviceGetComputeRunningProcesses_v3)
PROCESSES(nvmlDeviceGetGraphicsRunningProcesses_v3)
LONG_COUNT(nvmlDeviceGetCurrentClocksEventReasons)

result nvmlDeviceGetMemoryInfo_v2(device device, memory_v2 *into)
{
    const char *value;
    if (into->version != VERSION(memory_v2, 2))
        return ARGUMENT_VERSION_MISMATCH;
    result result = answer("nvmlDeviceGetMemoryInfo_v2", device, &value);
    if (!result && sscanf(value, "%llu %llu %llu %llu", &into->total, &into->reserved, &into->free, &into->used) != 4)
        return UNKNOWN;
    return result;
}

result nvmlDeviceGetTemperatureV(device device, temperature_v1 *into)
{
    unsigned int degrees;
    if (into->version != VERSION(temperature_v1, 1))
        return ARGUMENT_VERSION_MISMATCH;
    result result = count("nvmlDeviceGetTemperatureV", device, into->sensor, &degrees);
    if (!result)
        into->temperature = (int)degrees;
    return result;
}

#endif

/* --- MIG --- */

result nvmlDeviceGetMigMode(device device, unsigned int *current, unsigned int *pending)
{
    const char *value;
    result result = answer("nvmlDeviceGetMigMode", device, &value);
    if (!result && sscanf(value, "%u %u", current, pending) != 2)
        return UNKNOWN;
    return result;
}

result nvmlDeviceGetMigDeviceHandleByIndex(device device, unsigned int index, struct handle **into)
{
    unsigned long long instance;
    result result = number("nvmlDeviceGetMigDeviceHandleByIndex", device, index, &instance);
    if (result == NOT_SUPPORTED)
        return NOT_FOUND;
    if (!result)
        *into = handle_of((int)instance);
    return result;
}

/* --- events --- */

result nvmlEventSetCreate(event_set *into)
{
    result result = error_in(find("nvmlEventSetCreate", -1));
    if (!started)
        return UNINITIALIZED;
    if (result)
        return result;
    sets = (sets + 1) % SETS;
    set_device[sets] = -1;
    open_sets++;
    *into = (event_set)((uintptr_t)0x1000000 + (uintptr_t)sets);
    return SUCCESS;
}

result nvmlEventSetFree(event_set set)
{
    (void)set;
    result result = error_in(find("nvmlEventSetFree", -1));
    if (!started)
        return UNINITIALIZED;
    if (!result)
        open_sets--;
    return result;
}

result nvmlDeviceRegisterEvents(device device, unsigned long long types, event_set set)
{
    int number = number_of(device);
    if (!started)
        return UNINITIALIZED;
    if (number < 0 || types != 8) /* nvmlEventTypeXidCriticalError */
        return INVALID_ARGUMENT;
    result result = error_in(find("nvmlDeviceRegisterEvents", number));
    if (!result)
        set_device[(uintptr_t)set & 0xffff] = number;
    return result;
}

/* The script lists the XID errors that are waiting, each of which is given once. */
result nvmlEventSetWait_v2(event_set set, event_data *into, unsigned int milliseconds)
{
    int number = set_device[(uintptr_t)set & 0xffff];
    const char *value = NULL;
    if (milliseconds != 0 || number < 0)
        return INVALID_ARGUMENT;
    result result = answer("nvmlEventSetWait_v2", handle_of(number), &value);
    if (result)
        return result == NOT_SUPPORTED && !value ? TIMEOUT : result;
    unsigned long long xid;
    if (nth(value, (unsigned int)events_taken[number], &xid))
        return TIMEOUT;
    events_taken[number]++;
    *into = (event_data){handle_of(number), 8, xid, UINT32_MAX, UINT32_MAX};
    return SUCCESS;
}
